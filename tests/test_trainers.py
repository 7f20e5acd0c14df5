"""Trainers that step the optimizer themselves give the trajectory of a loop written by hand, and a model to export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import in_two_processes
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import dgate_wrap as dg

X = torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Y = (X.mean((1, 2, 3)) > 0).long() + (X[:, 0, :3].mean((1, 2)) > 0).long()
LAM = 0.02
LABELS = torch.tensor([0, 1, -1, -1, 2, 3, 4, -1])


def make(groups: object = "filters") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )
    return dg.gate(model.double(), groups, D=3)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def attached(model: nn.Module, **options: Any) -> Optimizer:
    optimizer = sgd(model)
    dg.Penalty(model, LAM, **options).attach(optimizer)
    return optimizer


def state(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def steps(model: nn.Module, optimizer: Optimizer, epochs: int, after: Callable[[], None] = lambda: None) -> None:
    for _ in range(epochs):
        for x, y in loader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            after()


def by_hand(epochs: int, *, accumulate: int = 1, schedule: Any = None) -> list[Tensor]:
    """Train without the library's penalty: 2λ/D · θ is added to the clipped gradient of each factor."""
    model = make()
    optimizer = sgd(model)
    scheduler = schedule and schedule(optimizer)
    factors = [p for n, p in model.named_parameters() if "parametrizations" in n]
    for _ in range(epochs):
        for k, (x, y) in enumerate(loader()):
            (F.cross_entropy(model(x), y) / accumulate).backward()
            if (k + 1) % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                for p in factors:
                    p.grad += 2 * LAM / 3 * p.detach()
                optimizer.step()
                optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return state(model)


def check_sparse_and_small(model: nn.Module, example: Any, optimizer: Any = None, tol: float = 1e-3) -> None:
    """A trained model of a trainer is sparse, and can be pruned and exported."""
    report = dg.prune(model, tol=tol, optimizer=optimizer)
    assert 0 < report.dead < report.total
    small = dg.export(model, example)
    assert sum(p.numel() for p in small.model.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())


# -- accelerate --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before prepare", "on the model's optimizer", "on the prepared optimizer"])
def test_accelerate(when: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make()
    optimizer = sgd(model)
    if when == "before prepare":
        dg.Penalty(model, LAM).attach(optimizer)
    prepared, stepped, batches = accelerator.prepare(model, optimizer, loader())
    if when != "before prepare":
        dg.Penalty(prepared, LAM).attach(optimizer if "model's" in when else stepped)
    for _ in range(60):
        for x, y in batches:
            with accelerator.accumulate(prepared):
                accelerator.backward(F.cross_entropy(prepared(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                stepped.step()
                stepped.zero_grad()
    trained = accelerator.unwrap_model(prepared)
    assert difference(state(trained), by_hand(60, accumulate=2)) < 1e-6
    check_sparse_and_small(trained, X, stepped)


# -- lightning ---------------------------------------------------------------------------------------------------------


def lightning_fit(module: Any, epochs: int, folder: Path, checkpoint: Path | None = None) -> Any:
    lightning = pytest.importorskip("lightning")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return trainer


def lightning_module(again: bool = False, epochs: int = 4) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()
            self.penalty = dg.Penalty(self.net, LAM)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self)
            if again:
                self.penalty.detach()
                self.penalty.attach(optimizer)
            else:
                dg.Penalty(self, LAM).attach(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, epochs)}

    return Module()


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes(tmp_path: Path) -> None:
    reference = by_hand(4, schedule=lambda o: CosineAnnealingLR(o, 4))
    whole = lightning_module()
    lightning_fit(whole, 4, tmp_path)
    assert difference(state(whole.net), reference) < 1e-6

    lightning_fit(lightning_module(), 2, tmp_path).save_checkpoint(tmp_path / "half")
    resumed = lightning_module()
    lightning_fit(resumed, 4, tmp_path, tmp_path / "half")
    assert difference(state(resumed.net), reference) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_lightning_fits_again_once_the_penalty_is_detached(tmp_path: Path) -> None:
    module = lightning_module()
    first = lightning_fit(module, 1, tmp_path)
    with pytest.raises(dg.PenaltyError, match="already") as e:
        lightning_fit(module, 1, tmp_path)
    assert "penalty.detach()" in e.value.mend
    assert first.optimizers

    module = lightning_module(again=True, epochs=40)
    first = lightning_fit(module, 2, tmp_path)
    first.save_checkpoint(tmp_path / "half")
    last = lightning_fit(module, 40, tmp_path, tmp_path / "half")
    assert difference(state(module.net), by_hand(40, schedule=lambda o: CosineAnnealingLR(o, 40))) < 1e-6
    check_sparse_and_small(module.net, X, last.optimizers[0], tol=1e-2)


# -- transformers ------------------------------------------------------------------------------------------------------

TOKENS = torch.randint(0, 20, (48, 8), generator=torch.Generator().manual_seed(1))
EXAMPLES = [{"input_ids": i, "labels": (i[0] > 9).long()} for i in TOKENS]


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 8}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = transformers.BertForSequenceClassification(config).double()
    return dg.gate(model, "neurons", D=3, include="*intermediate*")


def bert_trainer(model: nn.Module, folder: Path, attach: bool | None = None, epochs: int = 5, **options: Any) -> Any:
    """Make a trainer; its own optimizer gets the penalty, with or without ``adopt``, unless one is given."""
    transformers = pytest.importorskip("transformers")

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def create_optimizer(self, *given: Any) -> Any:
            optimizer = super().create_optimizer(*given)
            if attach is not None:
                dg.Penalty(self.model, LAM).attach(optimizer, adopt=attach)
            return optimizer

    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        optim="adamw_torch",
        weight_decay=options.pop("weight_decay", 0.0),
        **quiet,
    )
    return Trainer(model, arguments, train_dataset=EXAMPLES, **options)


def bert_by_hand(decayed: list[str], epochs: int = 5) -> list[Tensor]:
    model = bert()
    parts = [[p for n, p in model.named_parameters() if (n in decayed) == d] for d in (True, False)]
    groups = [{"params": p, "weight_decay": d} for p, d in zip(parts, (0.01, 0.0), strict=True) if p]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=6 * epochs)
    model.train()
    for k in range(6 * epochs):
        rows = slice(8 * (k % 6), 8 * (k % 6) + 8)
        optimizer.zero_grad()
        model(input_ids=TOKENS[rows], labels=(TOKENS[rows, 0] > 9).long()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for n, p in model.named_parameters():
            if "parametrizations" in n:
                p.grad += 2 * LAM / 3 * p.detach()
        optimizer.step()
        schedule.step()
    return state(model)


@pytest.mark.filterwarnings("ignore")
def test_transformers_with_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    dg.Penalty(model, LAM).attach(optimizer)
    bert_trainer(model, tmp_path, optimizers=(optimizer, None)).train()
    assert difference(state(model), bert_by_hand([])) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_transformers_with_its_own_optimizer(tmp_path: Path) -> None:
    model = bert()
    bert_trainer(model, tmp_path, attach=False).train()
    assert difference(state(model), bert_by_hand([])) < 1e-6

    with pytest.raises(dg.PenaltyError, match=r"AdamW decays 2 factors by itself") as e:
        bert_trainer(bert(), tmp_path, attach=False, weight_decay=0.01).train()
    assert "adopt=True" in e.value.mend

    model = bert()
    trainer = bert_trainer(model, tmp_path, attach=True, weight_decay=0.01)
    trainer.train()
    decayed = [n for n in trainer.get_decay_parameter_names(model) if "parametrizations" not in n]
    assert decayed
    assert difference(state(model), bert_by_hand(decayed)) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_transformers_hands_back_a_model_to_export(tmp_path: Path) -> None:
    trainer = bert_trainer(bert(), tmp_path, attach=True, epochs=10)
    trainer.train()
    model = trainer.model.eval()
    dg.prune(model, ratio=0.5, optimizer=trainer.optimizer)
    small = dg.export(model, {"input_ids": TOKENS}).model
    assert small.bert.encoder.layer[0].intermediate.dense.weight.shape[0] == 16
    torch.testing.assert_close(small(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


# -- several processes -------------------------------------------------------------------------------------------------


def check(rank: int, kind: str, references: list[list[Tensor]]) -> None:
    checks = {"ddp": check_ddp, "fsdp": check_fsdp}[kind](rank, references)
    assert max(checks.values()) < 1e-6, checks


def shared_steps(rank: int, model: nn.Module, optimizer: Optimizer, penalty: Any = lambda: 0.0) -> None:
    clip = penalty.__class__ is not dg.Penalty
    for _ in range(5):
        for x, y in loader():
            optimizer.zero_grad()
            (F.cross_entropy(model(x[4 * rank : 4 * rank + 4]), y[4 * rank : 4 * rank + 4]) + penalty()).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()


def check_ddp(rank: int, references: list[list[Tensor]]) -> dict[str, float]:
    checks: dict[str, float] = {}
    for first in (True, False):
        model = make()
        early = dg.Penalty(model, LAM) if first else None
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(wrapped)
        (early or dg.Penalty(wrapped, LAM)).attach(optimizer)
        shared_steps(rank, wrapped, optimizer)
        checks[f"penalty first: {first}"] = difference(state(wrapped.module), references[0])
    return checks


def partial() -> dict[str, Tensor]:
    return {"0.weight": LABELS.view(8, 1, 1, 1), "2.weight": LABELS.view(1, 8, 1, 1)}


def check_fsdp(rank: int, references: list[list[Tensor]]) -> dict[str, float]:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))

    def whole(model: nn.Module) -> list[Tensor]:
        return [p.full_tensor().detach() for p in model.parameters()]

    checks: dict[str, float] = {}
    for groups, options, reference in (("filters", {}, 0), (partial(), {"weights": "sqrt_size"}, 1)):
        for when in ("after", "before", "attached before"):
            model = make(groups)
            penalty = None if when == "after" else dg.Penalty(model, LAM, **options)
            optimizer = sgd(model)
            if penalty and when == "attached before":
                penalty.attach(optimizer)
            fully_shard(model, mesh=mesh)
            if when == "attached before":  # as a trainer does that got the optimizer before it sharded the model
                optimizer.param_groups[0]["params"] = list(model.parameters())
            else:
                optimizer = sgd(model)
                (penalty or dg.Penalty(model, LAM, **options)).attach(optimizer)
            shared_steps(rank, model, optimizer)
            checks[f"{reference}, penalty {when}"] = difference(whole(model), references[reference])

    model = make()
    penalty = dg.Penalty(model, LAM)
    value = penalty.value()
    fully_shard(model, mesh=mesh)
    checks["value"] = abs(penalty.value() - value)
    shared_steps(rank, model, sgd(model), penalty)
    checks["term"] = difference(whole(model), references[2])
    return checks


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(kind: str, tmp_path: Path) -> None:
    references = [by_hand(5)]
    if kind == "fsdp":
        model = make(partial())
        steps(model, attached(model, weights="sqrt_size"), 5)
        references.append(state(model))
        model = make()
        penalty, optimizer = dg.Penalty(model, LAM), sgd(model)
        for _ in range(5):
            for x, y in loader():
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) + penalty()).backward()
                optimizer.step()
        references.append(state(model))
    in_two_processes(tmp_path, check, kind, references)


# -- states, copies, averages, schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False])
def test_training_goes_on_from_states(fresh: bool) -> None:
    model = make()
    optimizer = attached(model)
    steps(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 2)
    if fresh:
        model = make()
        optimizer = attached(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    steps(model, optimizer, 5)
    assert difference(state(model), by_hand(10)) < 1e-6


def test_a_copy_trains_apart() -> None:
    model = make()
    optimizer = attached(model)
    steps(model, optimizer, 5)
    twin = copy.deepcopy(model)
    other = attached(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(twin, other, 5)
    assert difference(state(twin), by_hand(10)) < 1e-6
    assert difference(state(model), by_hand(5)) < 1e-6


@pytest.mark.parametrize("attach_last", [True, False])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: OneCycleLR(o, 0.1, total_steps=10),
        lambda o: SequentialLR(o, [LinearLR(o, total_iters=3), CosineAnnealingLR(o, 7)], [3]),
    ],
)
def test_schedules(schedule: Any, attach_last: bool) -> None:
    model = make()
    optimizer = sgd(model) if attach_last else attached(model)
    scheduler = schedule(optimizer)
    if attach_last:
        dg.Penalty(model, LAM).attach(optimizer)
    for _ in range(9):
        steps(model, optimizer, 1)
        scheduler.step()
    assert difference(state(model), by_hand(9, schedule=schedule)) < 1e-6


def test_an_average_of_models_is_gated() -> None:
    model = make()
    optimizer = attached(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected: list[Tensor] = []

    def after() -> None:
        average.update_parameters(model)
        expected[:] = [0.9 * e + 0.1 * p for e, p in zip(expected or state(model), state(model), strict=True)]

    steps(model, optimizer, 60, after)
    assert difference(state(average.module), expected) < 1e-6
    before = state(model)
    check_sparse_and_small(average.module, X)
    assert difference(state(model), before) == 0


# -- what trainers change while they train -----------------------------------------------------------------------------


def test_weights_frozen_since_are_left_alone_and_thawed_ones_are_not() -> None:
    model = make()
    model[2].requires_grad_(False)
    optimizer = attached(model)
    steps(model, optimizer, 1)
    model[0].requires_grad_(False)
    model[2].requires_grad_(True)
    optimizer.zero_grad()
    optimizer.state.clear()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    for n, p in model.named_parameters():
        shrunk = before[n] * (1 - 0.1 * 2 * LAM / 3) if n.startswith("2.parametrizations") else before[n]
        torch.testing.assert_close(p.detach(), shrunk)


def test_factors_added_since_are_penalized_and_their_decay_is_refused() -> None:
    model = make()
    model[2].requires_grad_(False)
    optimizer = sgd(model[0])
    dg.Penalty(model, LAM).attach(optimizer)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[2].parameters()), "weight_decay": 0.1})
    with pytest.raises(dg.PenaltyError, match="SGD decays 2 factors by itself"):
        optimizer.step()
    optimizer.param_groups[1]["weight_decay"] = 0.0
    before = state(model[2])
    optimizer.step()
    for p, old in zip(list(model[2].parameters())[1:], before[1:], strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 2 * LAM / 3))


def test_factors_that_left_the_optimizer_are_missed() -> None:
    model = make()
    optimizer = attached(model)
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    with pytest.raises(dg.PenaltyError, match="lacks 4 of 4 factors"):
        optimizer.step()


def test_a_penalty_follows_replaced_parameters() -> None:
    model = make()
    penalty = dg.Penalty(model, LAM)
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)
    assert penalty.value() == dg.Penalty(model, LAM).value()
    penalty().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "parametrizations" in n)
    model.zero_grad()
    optimizer = sgd(model)
    penalty.attach(optimizer)
    before = state(model[0])[2]
    optimizer.step()
    torch.testing.assert_close(state(model[0])[2], before * (1 - 0.1 * 2 * LAM / 3))

    dg.ungate(model)
    with pytest.raises(dg.NotGatedError):
        penalty.value()


def test_a_copied_penalty_is_its_own() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()
            self.penalty = dg.Penalty(self.net, LAM)

    task = Task()
    optimizer = sgd(task)
    task.penalty.attach(optimizer)
    twin = copy.deepcopy(task)
    with pytest.raises(dg.PenaltyError, match=r"lacks 4 of 4 factors: '0\.weight'"):
        twin.penalty.attach(optimizer)
    twin.penalty.attach(sgd(twin))
    twin.penalty.detach()
    before = state(task.net[0])[2]
    optimizer.step()
    torch.testing.assert_close(state(task.net[0])[2], before * (1 - 0.1 * 2 * LAM / 3))
