"""Architectures at large, small and with random weights: those of ``transformers``, and those of `handwritten`.

Nothing is downloaded: every model of ``transformers`` is built from a configuration. Unless said otherwise it has two
layers of four heads, width 32 and 64 units inside its feed-forward layers. Where the names of a configuration's fields
are those of BERT or Llama, `ENCODER` and `DECODER` give them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from handwritten import HANDWRITTEN
from patterns import Case, ids
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

Make = Callable[[], dict[str, Any]]

VOCABULARY = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENCODER = {**_BODY, **VOCABULARY, "max_position_embeddings": 32, "type_vocab_size": 2}
DECODER = {**_BODY, **VOCABULARY, "max_position_embeddings": 32, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}
IMAGE = {**_BODY, "image_size": 32, "patch_size": 8}
BART = {
    **{f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 2), ("attention_heads", 4))},
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "d_model": 32,
    "max_position_embeddings": 32,
    "use_cache": False,
    **VOCABULARY,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    **VOCABULARY,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
WAVE = {
    **_BODY,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    **VOCABULARY,
    "mask_time_prob": 0.0,
}

# What is known of the usual shapes: two layers of attention and feed-forward, alone and as encoder and decoder.
LAYERS = {"heads": 8, "hidden": 128, "blocks": 4}
GROUPED_LAYERS = {**LAYERS, "heads": 4}
PARALLEL_LAYERS = {"heads": 8, "hidden": 128}  # attention and feed-forward add to one stream: what a block is, is open
SEQ2SEQ = {"heads": 24, "hidden": 256, "blocks": 10}
DATA_DEPENDENT = frozenset({"xlm", "switch", "superpoint", "llava"})
RESIDUAL = frozenset({"blocks"})
EMBEDDED = frozenset({"blocks", "embedding_dims"})
CONVOLUTIONAL = frozenset({"channels"})
RESIDUAL_CNN = CONVOLUTIONAL | RESIDUAL


def _text() -> dict[str, Any]:
    return {"input_ids": ids(2, 7)}


def _masked() -> dict[str, Any]:
    return {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def _pair() -> dict[str, Any]:
    return {"input_ids": ids(2, 7), "decoder_input_ids": ids(2, 5)}


def _masked_pair() -> dict[str, Any]:
    return _pair() | {"attention_mask": torch.ones(2, 7, dtype=torch.long)}


def _image(size: int = 32) -> Make:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def _wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 320)}


def _features(name: str, *shape: int) -> Make:
    return lambda: {name: torch.randn(2, *shape)}


def _both() -> dict[str, Any]:
    return _masked() | _image()()


def _from_config(model: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        kind = getattr(importlib.import_module("transformers"), model)
        return kind(kind.config_class(**config)).eval()

    return factory


def _case(
    family: str,
    name: str,
    model: str,
    config: dict[str, Any],
    kwargs: Make,
    expect: dict[str, int] | None = None,
    applies: Iterable[str] = (),
) -> Case:
    make = _from_config(model, config)
    return Case(name, family, make, tuple, kwargs, frozenset(applies), expect or {}, name in DATA_DEPENDENT)


def _encoder(name: str, model: str, expect: dict[str, int] = LAYERS, kwargs: Make = _text, **other: Any) -> Case:
    return _case("text encoder", name, model, {**ENCODER, **other}, kwargs, expect, EMBEDDED)


def _decoder(
    name: str, model: str, expect: dict[str, int] = GROUPED_LAYERS, applies: Iterable[str] = EMBEDDED, **other: Any
) -> Case:
    return _case("decoder", name, model, {**GROUPED, **other}, _text, expect, applies)


def _mixture(name: str, model: str, expect: dict[str, int], **other: Any) -> Case:
    return _case("mixture of experts", name, model, {**GROUPED, **other}, _text, expect, EMBEDDED | {"hidden"})


def _seq2seq(
    name: str,
    model: str,
    expect: dict[str, int] = SEQ2SEQ,
    base: dict[str, Any] = BART,
    kwargs: Make = _pair,
    **other: Any,
) -> Case:
    return _case("encoder-decoder", name, model, {**base, **other}, kwargs, expect, EMBEDDED)


def _vision(
    name: str,
    model: str,
    expect: dict[str, int] | None = None,
    applies: Iterable[str] = (),
    base: dict[str, Any] | None = None,
    kwargs: Make | None = None,
    **other: Any,
) -> Case:
    return _case(
        "vision", name, model, {**(IMAGE if base is None else base), **other}, kwargs or _image(), expect, applies
    )


def _audio(
    name: str, model: str, expect: dict[str, int], base: dict[str, Any] = WAVE, kwargs: Make = _wave, **other: Any
) -> Case:
    return _case("audio", name, model, {**base, **other}, kwargs, expect, {"channels", "blocks"})


TEXT_ENCODERS = [
    _encoder("bert", "BertModel", kwargs=_masked),
    _encoder("bert_classifier", "BertForTokenClassification"),
    _encoder("roberta", "RobertaModel"),
    _encoder("roberta_prelayernorm", "RobertaPreLayerNormModel"),
    _encoder("albert", "AlbertModel", {"heads": 4, "hidden": 64}, embedding_size=16),
    _encoder("electra", "ElectraModel", embedding_size=16),
    _encoder("deberta", "DebertaModel", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("deberta_v2", "DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
    _encoder("distilbert", "DistilBertModel", dim=32, n_heads=4, n_layers=2, hidden_dim=64),
    _encoder("mpnet", "MPNetModel"),
    _case(
        "text encoder",
        "funnel",
        "FunnelBaseModel",
        {**VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]},
        _text,
        LAYERS,
        EMBEDDED,
    ),
    _encoder("fnet", "FNetModel", {"hidden": 128, "blocks": 2}),
    _encoder("modernbert", "ModernBertModel", cls_token_id=1, sep_token_id=2),
    _encoder("nomic_bert", "NomicBertModel"),
    _case(
        "text encoder",
        "xlnet",
        "XLNetModel",
        {**VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        _text,
        LAYERS,
        EMBEDDED,
    ),
    _encoder(
        "xlm", "XLMModel", {"heads": 8, "hidden": 256, "blocks": 4}, emb_dim=32, n_layers=2, n_heads=4, n_words=99
    ),
    _encoder("convbert", "ConvBertModel", {}, embedding_size=32, conv_kernel_size=3),
    _encoder("roformer", "RoFormerModel"),
    _encoder("squeezebert", "SqueezeBertModel", {"heads": 8, "blocks": 4}, embedding_size=32),
    _encoder("nystromformer", "NystromformerModel", num_landmarks=7, conv_kernel_size=3, segment_means_seq_len=7),
    _encoder("big_bird", "BigBirdModel", attention_type="original_full"),
    _encoder("rembert", "RemBertModel", input_embedding_size=16, output_embedding_size=16),
    _encoder("mobilebert", "MobileBertModel", {}, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    _encoder("esm", "EsmModel", position_embedding_type="rotary"),
    _encoder("ibert", "IBertModel"),
    _encoder("megatron_bert", "MegatronBertModel"),
]

TEXT_DECODERS = [
    _decoder("gpt2", "GPT2LMHeadModel", LAYERS, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=32),
    _decoder(
        "gpt_neo", "GPTNeoForCausalLM", LAYERS, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    _decoder("gptj", "GPTJForCausalLM", PARALLEL_LAYERS, n_embd=32, n_layer=2, n_head=4, n_inner=64, rotary_dim=4),
    _decoder(
        "codegen", "CodeGenForCausalLM", PARALLEL_LAYERS, n_embd=32, n_layer=2, n_head=4, n_inner=64, rotary_dim=4
    ),
    _decoder("gpt_neox", "GPTNeoXForCausalLM", PARALLEL_LAYERS),
    _decoder(
        "gpt_bigcode", "GPTBigCodeForCausalLM", {**LAYERS, "heads": 2}, n_embd=32, n_layer=2, n_head=4, n_inner=64
    ),
    _decoder(
        "openai_gpt", "OpenAIGPTLMHeadModel", {**LAYERS, "hidden": 256}, n_embd=32, n_layer=2, n_head=4, n_positions=32
    ),
    _decoder("ctrl", "CTRLLMHeadModel", LAYERS, n_embd=32, n_layer=2, n_head=4, dff=64, n_positions=32),
    _decoder("opt", "OPTForCausalLM", LAYERS, ffn_dim=64, word_embed_proj_dim=32),
    _decoder("bloom", "BloomForCausalLM", {**LAYERS, "hidden": 256}, n_layer=2, n_head=4),
    _decoder("llama", "LlamaForCausalLM"),
    _decoder("mistral", "MistralForCausalLM", sliding_window=4),
    _decoder("qwen2", "Qwen2ForCausalLM"),
    _decoder("qwen3", "Qwen3ForCausalLM", head_dim=8),
    _decoder("gemma", "GemmaForCausalLM", head_dim=8),
    _decoder("gemma2", "Gemma2ForCausalLM", head_dim=8, sliding_window=4),
    _decoder("gemma3", "Gemma3ForCausalLM", head_dim=8, sliding_window=4),
    _decoder("phi", "PhiForCausalLM", {"heads": 4, "hidden": 128}),
    _decoder("phi3", "Phi3ForCausalLM"),
    _decoder("olmo", "OlmoForCausalLM"),
    _decoder("olmo2", "Olmo2ForCausalLM"),
    _decoder("cohere", "CohereForCausalLM", {"heads": 4, "hidden": 128}),
    _decoder("cohere2", "Cohere2ForCausalLM", {"heads": 4, "hidden": 128}, sliding_window=4),
    _decoder("falcon", "FalconForCausalLM", {"heads": 2, "hidden": 128}, ffn_hidden_size=64),
    _decoder(
        "falcon_alibi",
        "FalconForCausalLM",
        LAYERS,
        ffn_hidden_size=64,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
    ),
    _decoder(
        "mpt",
        "MptForCausalLM",
        {**LAYERS, "hidden": 256},
        d_model=32,
        n_heads=4,
        n_layers=2,
        expansion_ratio=2,
        max_seq_len=32,
    ),
    _decoder("stablelm", "StableLmForCausalLM"),
    _decoder("starcoder2", "Starcoder2ForCausalLM"),
    _decoder("granite", "GraniteForCausalLM"),
    _decoder("nemotron", "NemotronForCausalLM", head_dim=8),
    _decoder("persimmon", "PersimmonForCausalLM", LAYERS),
    _decoder("glm", "GlmForCausalLM", head_dim=8),
    _decoder("helium", "HeliumForCausalLM", head_dim=8),
    _decoder("smollm3", "SmolLM3ForCausalLM"),
    _decoder("exaone4", "Exaone4ForCausalLM", sliding_window=4),
    _decoder("arcee", "ArceeForCausalLM"),
    _decoder("apertus", "ApertusForCausalLM"),
    _decoder("diffllama", "DiffLlamaForCausalLM", {"hidden": 128, "blocks": 4}, {"heads"}),
    _decoder("biogpt", "BioGptForCausalLM", LAYERS),
    _decoder("xglm", "XGLMForCausalLM", LAYERS, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
]

MIXTURES = [
    _mixture("mixtral", "MixtralForCausalLM", {"heads": 4, "experts": 8}, num_local_experts=4),
    _mixture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {"heads": 4, "experts": 10},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    _mixture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"heads": 4, "experts": 8},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=8,
    ),
    _mixture("olmoe", "OlmoeForCausalLM", {"heads": 4, "experts": 8}, num_experts=4, num_experts_per_tok=2),
    _mixture(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {"heads": 8, "experts": 4},
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    _mixture(
        "gpt_oss",
        "GptOssForCausalLM",
        {"heads": 4, "experts": 8},
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=4,
    ),
    _mixture(
        "granitemoe", "GraniteMoeForCausalLM", {"heads": 4, "experts": 8}, num_local_experts=4, num_experts_per_tok=2
    ),
    _mixture("phimoe", "PhimoeForCausalLM", {"heads": 4, "experts": 8}, num_local_experts=4),
]

RECURRENT = [
    _case(
        "state space",
        "mamba",
        "MambaForCausalLM",
        {**DECODER, "state_size": 4, "time_step_rank": 4},
        _text,
        {"blocks": 2},
        EMBEDDED,
    ),
    _case(
        "state space",
        "mamba2",
        "Mamba2ForCausalLM",
        {**DECODER, "state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 4},
        _text,
        {"blocks": 2},
        EMBEDDED,
    ),
    _case(
        "state space",
        "falcon_mamba",
        "FalconMambaForCausalLM",
        {**DECODER, "state_size": 4, "time_step_rank": 4},
        _text,
        {"blocks": 2},
        EMBEDDED,
    ),
    _case(
        "linear attention",
        "rwkv",
        "RwkvForCausalLM",
        {**DECODER, "attention_hidden_size": 32},
        _text,
        {"blocks": 4},
        EMBEDDED | {"hidden"},
    ),
    _case(
        "state space",
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {
            **GROUPED,
            "lru_width": 32,
            "head_dim": 8,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
        },
        _text,
        {"heads": 2, "blocks": 4},
        EMBEDDED | {"hidden"},
    ),
    _case(
        "state space",
        "lfm2",
        "Lfm2ForCausalLM",
        {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        _text,
        {"heads": 2, "blocks": 4},
        EMBEDDED | {"hidden"},
    ),
    _case(
        "state space",
        "bamba",
        "BambaForCausalLM",
        {
            **GROUPED,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        },
        _text,
        {"heads": 2, "blocks": 4},
        EMBEDDED | {"hidden"},
    ),
]

SEQUENCE_TO_SEQUENCE = [
    _seq2seq("t5", "T5ForConditionalGeneration", base=T5),
    _seq2seq("mt5_gated", "MT5ForConditionalGeneration", base=T5, feed_forward_proj="gated-gelu"),
    _seq2seq("umt5", "UMT5ForConditionalGeneration", base=T5),
    _seq2seq("longt5", "LongT5ForConditionalGeneration", base=T5, kwargs=_masked_pair, local_radius=3),
    _seq2seq(
        "switch",
        "SwitchTransformersForConditionalGeneration",
        {"heads": 24, "blocks": 10, "experts": 8},
        base=T5,
        kwargs=_masked_pair,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=8,
    ),
    _seq2seq("bart", "BartForConditionalGeneration"),
    _seq2seq("mbart", "MBartForConditionalGeneration"),
    _seq2seq("pegasus", "PegasusForConditionalGeneration"),
    _seq2seq("marian", "MarianMTModel"),
    _seq2seq("blenderbot", "BlenderbotForConditionalGeneration"),
    _seq2seq("m2m_100", "M2M100ForConditionalGeneration"),
    _seq2seq(
        "prophetnet",
        "ProphetNetModel",
        base={
            **VOCABULARY,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 32,
            "use_cache": False,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        },
    ),
    _seq2seq(
        "fsmt",
        "FSMTForConditionalGeneration",
        kwargs=lambda: _masked_pair() | {"decoder_attention_mask": torch.ones(2, 5, dtype=torch.long)},
        langs=["a", "b"],
        src_vocab_size=99,
        tgt_vocab_size=99,
    ),
]

_PYRAMID = {
    "depths": [1, 2],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [1, 2],
    "num_encoder_blocks": 2,
    "mlp_ratios": [2, 2],
    "strides": [4, 2],
}
_STAGES = {"depths": [2, 1], "hidden_sizes": [8, 16]}
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
}

VISION = [
    _vision("vit", "ViTModel", LAYERS),
    _vision("vit_msn", "ViTMSNModel", LAYERS),
    _vision("deit", "DeiTForImageClassificationWithTeacher", LAYERS),
    _vision("beit", "BeitModel", LAYERS, use_relative_position_bias=True),
    _vision("data2vec_vision", "Data2VecVisionModel", LAYERS, use_shared_relative_position_bias=True),
    _vision("dinov2", "Dinov2Model", LAYERS, mlp_ratio=2),
    _vision("dinov2_swiglu", "Dinov2Model", {**LAYERS, "hidden": 96}, mlp_ratio=2, use_swiglu_ffn=True),
    _vision("dinov2_registers", "Dinov2WithRegistersModel", LAYERS, mlp_ratio=2),
    _vision("dinov3_vit", "DINOv3ViTModel", LAYERS),
    _vision("ijepa", "IJepaModel", LAYERS),
    _vision(
        "yolos",
        "YolosForObjectDetection",
        {"heads": 8, "blocks": 4},
        {"hidden"},
        image_size=[32, 32],
        num_detection_tokens=3,
    ),
    _vision("swin", "SwinForImageClassification", {"heads": 8, "hidden": 128, "blocks": 6}, base=_SWIN),
    _vision("swinv2", "Swinv2ForImageClassification", {"heads": 8, "blocks": 6}, {"hidden"}, base=_SWIN),
    _vision(
        "hiera",
        "HieraModel",
        {},
        {"heads", "hidden", "blocks"},
        base={
            "image_size": [32, 32],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
        },
    ),
    _vision(
        "convnext",
        "ConvNextForImageClassification",
        {"blocks": 3},
        CONVOLUTIONAL,
        base={**_STAGES, "num_stages": 2, "layer_scale_init_value": 0.1},
    ),
    _vision(
        "convnextv2",
        "ConvNextV2ForImageClassification",
        {"blocks": 3},
        CONVOLUTIONAL,
        base={**_STAGES, "num_stages": 2},
    ),
    _vision(
        "resnet_basic",
        "ResNetForImageClassification",
        {"blocks": 3},
        CONVOLUTIONAL,
        base={**_STAGES, "embedding_size": 8, "layer_type": "basic"},
    ),
    _vision(
        "resnet_bottleneck",
        "ResNetForImageClassification",
        {"blocks": 3},
        CONVOLUTIONAL,
        base={**_STAGES, "hidden_sizes": [16, 32], "embedding_size": 8},
    ),
    _vision(
        "bit",
        "BitForImageClassification",
        {"blocks": 3},
        CONVOLUTIONAL,
        base={**_STAGES, "hidden_sizes": [16, 32], "embedding_size": 8, "num_groups": 4},
    ),
    _vision(
        "regnet_x",
        "RegNetForImageClassification",
        {"blocks": 3},
        CONVOLUTIONAL,
        base={**_STAGES, "embedding_size": 8, "groups_width": 4, "layer_type": "x"},
    ),
    _vision(
        "regnet_y",
        "RegNetForImageClassification",
        {"blocks": 3},
        CONVOLUTIONAL,
        base={**_STAGES, "embedding_size": 8, "groups_width": 4},
    ),
    _vision("mobilenet_v1", "MobileNetV1ForImageClassification", {}, CONVOLUTIONAL, base={"depth_multiplier": 0.1}),
    _vision("mobilenet_v2", "MobileNetV2ForImageClassification", {}, RESIDUAL_CNN, base={"depth_multiplier": 0.1}),
    _vision(
        "mobilevit",
        "MobileViTForImageClassification",
        {"heads": 18},
        RESIDUAL_CNN | {"hidden"},
        base={
            "image_size": 32,
            "hidden_sizes": [8, 12, 16],
            "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
            "num_attention_heads": 2,
        },
    ),
    _vision(
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        {},
        RESIDUAL_CNN | {"hidden"},
        base={"image_size": 64, "width_multiplier": 0.1, "base_attn_unit_dims": [16, 24, 32]},
        kwargs=_image(64),
    ),
    _vision(
        "efficientnet",
        "EfficientNetForImageClassification",
        {},
        RESIDUAL_CNN,
        base={
            "image_size": 32,
            "width_coefficient": 0.1,
            "depth_coefficient": 1.0,
            "hidden_dim": 128,
            "kernel_sizes": [3, 3, 5],
            "in_channels": [32, 16, 16],
            "out_channels": [16, 16, 24],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 1],
            "expand_ratios": [1, 4, 4],
        },
    ),
    _vision(
        "segformer",
        "SegformerForSemanticSegmentation",
        {"heads": 5, "blocks": 6},
        {"hidden"},
        base={**_PYRAMID, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "decoder_hidden_size": 16},
    ),
    _vision(
        "pvt",
        "PvtForImageClassification",
        {"heads": 5, "blocks": 6},
        {"hidden"},
        base={**_PYRAMID, "image_size": 32, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]},
    ),
    _vision(
        "pvt_v2",
        "PvtV2ForImageClassification",
        {"heads": 5, "blocks": 6},
        {"hidden"},
        base={**_PYRAMID, "image_size": 32, "sr_ratios": [2, 1], "patch_sizes": [7, 3]},
    ),
    _vision(
        "glpn",
        "GLPNForDepthEstimation",
        {"heads": 5},
        RESIDUAL_CNN | {"hidden"},
        base={**_PYRAMID, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "decoder_hidden_size": 8},
    ),
    _vision(
        "poolformer",
        "PoolFormerForImageClassification",
        {"blocks": 6},
        CONVOLUTIONAL,
        base={
            "depths": [2, 1],
            "hidden_sizes": [8, 16],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
            "layer_scale_init_value": 0.1,
        },
    ),
    _vision(
        "cvt",
        "CvtForImageClassification",
        {"heads": 5, "blocks": 6},
        CONVOLUTIONAL,
        base={
            "patch_sizes": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [2, 1],
            "embed_dim": [16, 32],
            "num_heads": [1, 2],
            "depth": [1, 2],
            "mlp_ratio": [2.0, 2.0],
            "attention_drop_rate": [0.0, 0.0],
            "drop_rate": [0.0, 0.0],
            "drop_path_rate": [0.0, 0.0],
            "qkv_bias": [True, True],
            "cls_token": [False, True],
            "qkv_projection_method": ["dw_bn", "dw_bn"],
            "kernel_qkv": [3, 3],
            "padding_kv": [1, 1],
            "stride_kv": [2, 2],
            "padding_q": [1, 1],
            "stride_q": [1, 1],
        },
    ),
    _vision(
        "levit",
        "LevitForImageClassification",
        {},
        {"heads", "hidden", "blocks"},
        base={
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        kwargs=_image(64),
    ),
    _vision(
        "focalnet",
        "FocalNetForImageClassification",
        {"blocks": 6},
        {"hidden"},
        base={
            "image_size": 32,
            "embed_dim": 8,
            "hidden_sizes": [8, 16],
            "depths": [2, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
    ),
    _vision(
        "swiftformer",
        "SwiftFormerForImageClassification",
        {},
        RESIDUAL_CNN,
        base={
            "image_size": 64,
            "depths": [2, 2],
            "embed_dims": [8, 16],
            "downsamples": [True, True],
            "layer_scale_init_value": 0.1,
        },
        kwargs=_image(64),
    ),
    _vision(
        "textnet",
        "TextNetForImageClassification",
        {},
        CONVOLUTIONAL,
        base={
            "image_size": [32, 32],
            "stem_out_channels": 8,
            "hidden_sizes": [8, 8, 16],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [1, 3]]],
            "conv_layer_strides": [[1], [2, 1]],
        },
    ),
    _vision("vit_mae", "ViTMAEModel", LAYERS, kwargs=lambda: _image()() | {"noise": torch.rand(2, 16)}, mask_ratio=0.5),
    _vision(
        "vitdet",
        "VitDetModel",
        LAYERS,
        pretrain_image_size=32,
        mlp_ratio=2,
        window_block_indices=[0],
        window_size=2,
        use_relative_position_embeddings=True,
    ),
    _vision(
        "dpt",
        "DPTForDepthEstimation",
        {"heads": 16},
        RESIDUAL_CNN | {"hidden"},
        base={
            **IMAGE,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
    ),
    _vision(
        "sam",
        "SamModel",
        {},
        {"heads", "hidden", "blocks"},
        base={
            "vision_config": {
                **_BODY,
                "image_size": 32,
                "patch_size": 8,
                "output_channels": 16,
                "num_pos_feats": 8,
                "mlp_dim": 64,
                "global_attn_indexes": [1],
                "window_size": 2,
            },
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 32,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        },
    ),
    _vision(
        "mask2former",
        "Mask2FormerForUniversalSegmentation",
        {},
        {"heads", "hidden", "blocks"},
        base={
            "backbone_config": {
                "model_type": "swin",
                **_SWIN,
                "depths": [1, 1, 1, 1],
                "num_heads": [2, 2, 2, 2],
                "window_size": 2,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 16,
            "dim_feedforward": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "num_queries": 3,
        },
    ),
    _vision(
        "maskformer",
        "MaskFormerForInstanceSegmentation",
        {},
        {"heads", "hidden", "blocks"},
        base={
            "backbone_config": {
                "model_type": "swin",
                **_SWIN,
                "depths": [1, 1, 1, 1],
                "num_heads": [2, 2, 2, 2],
                "window_size": 2,
            },
            "decoder_config": {
                "model_type": "detr",
                "d_model": 16,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "decoder_ffn_dim": 16,
                "num_queries": 3,
            },
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
        },
    ),
    _vision(
        "detr",
        "DetrForObjectDetection",
        {},
        {"heads", "hidden", "blocks", "channels"},
        base={
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                **_STAGES,
                "hidden_sizes": [8, 16],
                "embedding_size": 8,
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "num_queries": 3,
        },
    ),
    _vision(
        "superpoint",
        "SuperPointForKeypointDetection",
        {},
        CONVOLUTIONAL,
        base={"encoder_hidden_sizes": [8, 8, 8, 8], "decoder_hidden_size": 8, "descriptor_decoder_dim": 8},
    ),
]

AUDIO = [
    _audio("wav2vec2", "Wav2Vec2Model", {"heads": 8}),
    _audio(
        "wav2vec2_stable",
        "Wav2Vec2Model",
        {"heads": 8},
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    ),
    _audio("hubert", "HubertModel", {"heads": 8}),
    _audio("wavlm", "WavLMModel", {"heads": 8}, num_buckets=8, max_bucket_distance=16),
    _audio("sew", "SEWModel", {"heads": 8}, squeeze_factor=2),
    _audio("unispeech_sat", "UniSpeechSatModel", {"heads": 8}),
    _audio("wav2vec2_conformer", "Wav2Vec2ConformerModel", {"heads": 8}, conv_depthwise_kernel_size=3),
    _audio(
        "whisper",
        "WhisperForConditionalGeneration",
        {"heads": 24, "blocks": 10},
        BART,
        lambda: {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": ids(2, 5)},
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
    ),
    _audio(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        {"heads": 24, "blocks": 10},
        BART,
        lambda: {"input_features": torch.randn(2, 16, 8), "decoder_input_ids": ids(2, 5)},
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=32,
        max_target_positions=32,
    ),
    _case(
        "audio",
        "ast",
        "ASTModel",
        {**_BODY, "num_mel_bins": 16, "max_length": 16, "patch_size": 4, "frequency_stride": 4, "time_stride": 4},
        _features("input_values", 16, 16),
        LAYERS,
    ),
    _audio(
        "dac",
        "DacModel",
        {},
        {
            "encoder_hidden_size": 4,
            "decoder_hidden_size": 8,
            "downsampling_ratios": [2, 2],
            "upsampling_ratios": [2, 2],
            "hidden_size": 16,
            "codebook_size": 8,
            "codebook_dim": 4,
            "n_codebooks": 2,
        },
        lambda: {"input_values": torch.randn(1, 1, 64)},
    ),
    _audio(
        "univnet",
        "UnivNetModel",
        {},
        {
            "model_in_channels": 8,
            "model_hidden_channels": 8,
            "num_mel_bins": 8,
            "resblock_kernel_sizes": [3],
            "resblock_stride_sizes": [2],
            "resblock_dilation_sizes": [[1, 3]],
            "kernel_predictor_hidden_channels": 8,
        },
        lambda: {"input_features": torch.randn(1, 4, 8), "noise_sequence": torch.randn(1, 4, 8)},
    ),
]

_SERIES = {"context_length": 16, "num_input_channels": 2, "patch_length": 4, "patch_stride": 4, "prediction_length": 4}
_FORECAST = {
    **BART,
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1],
    "num_time_features": 1,
    "num_parallel_samples": 2,
}


def _past() -> dict[str, Any]:
    shapes = {
        "past_values": (2, 9),
        "past_time_features": (2, 9, 1),
        "future_values": (2, 4),
        "future_time_features": (2, 4, 1),
    }
    return {**{k: torch.randn(s) for k, s in shapes.items()}, "past_observed_mask": torch.ones(2, 9)}


SERIES = [
    _case(
        "time series",
        "patchtst",
        "PatchTSTForPrediction",
        {**_SERIES, "d_model": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 64},
        _features("past_values", 16, 2),
        {k: n for k, n in LAYERS.items() if k != "hidden"},
    ),
    _case(
        "time series",
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        {**_SERIES, "d_model": 8, "num_layers": 2},
        _features("past_values", 16, 2),
        {},
        {"hidden", "blocks"},
    ),
    _case(
        "time series",
        "informer",
        "InformerModel",
        {**_FORECAST, "attention_type": "full", "distil": False},
        _past,
        {"heads": 24},
        {"hidden", "blocks"},
    ),
    _case("time series", "time_series_transformer", "TimeSeriesTransformerModel", _FORECAST, _past, SEQ2SEQ),
    _case(
        "time series",
        "autoformer",
        "AutoformerModel",
        {**_FORECAST, "label_length": 4},
        _past,
        {},
        {"hidden", "blocks"},
    ),
]

TOWERS = {"text_config": ENCODER, "vision_config": IMAGE, "projection_dim": 16}
CAPTION = {"text_config": {**ENCODER, "encoder_hidden_size": 32}, "vision_config": IMAGE}
TWO_TOWERS = {"heads": 16, "hidden": 256, "blocks": 8}

MULTIMODAL = [
    _case("multimodal", "clip", "CLIPModel", TOWERS, _both, TWO_TOWERS),
    _case("multimodal", "chinese_clip", "ChineseCLIPModel", TOWERS, _both, TWO_TOWERS),
    _case("multimodal", "clipseg", "CLIPSegModel", TOWERS, _both, TWO_TOWERS),
    _case("multimodal", "owlvit", "OwlViTModel", TOWERS, _both, TWO_TOWERS),
    _case(
        "multimodal",
        "siglip",
        "SiglipModel",
        {"text_config": {**ENCODER, "projection_size": 32}, "vision_config": IMAGE},
        _both,
        {"heads": 20, "hidden": 320, "blocks": 9},
    ),
    _case(
        "multimodal", "blip", "BlipForConditionalGeneration", CAPTION, _both, {"heads": 24, "blocks": 10}, {"hidden"}
    ),
    _case(
        "multimodal",
        "vilt",
        "ViltModel",
        {**ENCODER, **IMAGE},
        lambda: _masked() | {"image_embeds": torch.randn(2, 3, 32), "pixel_mask": torch.ones(2, 3)},
        LAYERS,
    ),
    _case("multimodal", "git", "GitForCausalLM", {**DECODER, "vision_config": IMAGE}, _both, TWO_TOWERS),
    _case(
        "multimodal",
        "visual_bert",
        "VisualBertModel",
        {**ENCODER, "visual_embedding_dim": 8},
        lambda: _masked() | {"visual_embeds": torch.randn(2, 3, 8)},
        LAYERS,
    ),
    _case(
        "multimodal",
        "layoutlm",
        "LayoutLMModel",
        {**ENCODER, "max_2d_position_embeddings": 32},
        lambda: _text() | {"bbox": torch.arange(8, 22).sort()[0][:4].expand(2, 7, 4)},
        LAYERS,
    ),
    _case(
        "multimodal",
        "lxmert",
        "LxmertModel",
        {**ENCODER, "visual_feat_dim": 8, "visual_pos_dim": 4, "l_layers": 1, "r_layers": 1, "x_layers": 1},
        lambda: _text() | {"visual_feats": torch.randn(2, 3, 8), "visual_pos": torch.rand(2, 3, 4)},
        {},
        {"heads", "hidden", "blocks"},
    ),
    _case(
        "multimodal",
        "llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **IMAGE},
            "image_token_index": 98,
            "vision_feature_layer": -1,
        },
        lambda: {"input_ids": torch.tensor([[1, *[98] * 16, 5, 6]]), "pixel_values": torch.randn(1, 3, 32, 32)},
        {"heads": 12, "hidden": 288, "blocks": 8},
    ),
    _case(
        "multimodal",
        "groupvit",
        "GroupViTModel",
        {
            "text_config": ENCODER,
            "vision_config": {**IMAGE, "depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 4]},
            "projection_dim": 16,
            "projection_intermediate_dim": 16,
        },
        _both,
        {},
        {"heads", "hidden", "blocks"},
    ),
    _case(
        "reinforcement learning",
        "decision_transformer",
        "DecisionTransformerModel",
        {
            "state_dim": 5,
            "act_dim": 2,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 64,
            "max_ep_len": 16,
            "n_positions": 32,
            "vocab_size": 1,
        },
        lambda: {
            "states": torch.randn(2, 4, 5),
            "actions": torch.randn(2, 4, 2),
            "rewards": torch.randn(2, 4, 1),
            "returns_to_go": torch.randn(2, 4, 1),
            "timesteps": torch.arange(4).expand(2, 4),
            "attention_mask": torch.ones(2, 4),
        },
        LAYERS,
    ),
    _case(
        "multimodal",
        "perceiver",
        "PerceiverModel",
        {
            "d_model": 16,
            "d_latents": 16,
            "num_latents": 4,
            "num_blocks": 1,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
        },
        lambda: {"inputs": torch.randn(2, 6, 16)},
        {},
        {"heads", "hidden", "blocks"},
    ),
]

ARCHITECTURES = [
    *TEXT_ENCODERS,
    *TEXT_DECODERS,
    *MIXTURES,
    *RECURRENT,
    *SEQUENCE_TO_SEQUENCE,
    *VISION,
    *AUDIO,
    *SERIES,
    *MULTIMODAL,
    *HANDWRITTEN,
]
_BY_NAME = {case.name: case for case in ARCHITECTURES}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Build the architecture of this name, with its positional and keyword example inputs."""
    return _BY_NAME[name].build()
