"""The parts of other architectures of ``transformers`` that no decoder of ours has: the reasons of their refusals.

A model is refused by its ``model_type`` before its weights are looked at. The sweep over all causal architectures
(``benchmarks.architectures``) finds the part that a reason names in a small model of each.
"""

from __future__ import annotations

EXPERTS = "a feed-forward network of experts"
LATENT = "keys and values that are made of a smaller latent vector"
RECURRENT = "recurrent layers (state-space or linear attention) among its layers"
CONVOLUTION = "convolutions over neighbouring tokens"
POST_NORM = "norms behind attention and the feed-forward network"
LAYER_NORM = "LayerNorm in place of RMSNorm"
NO_GATE = "a feed-forward network without a gate"
PLACES = "embeddings of positions in place of rotary ones"
BIASES = "positions as a bias of the scores in place of rotary ones"
PARTIAL = "rotary positions of a part of each head"
SCALED = "token embeddings that are multiplied by a constant"
OFFSET_GAIN = "norms that multiply by 1 + gain"
CAPPED = "logits or scores that are capped"
LOGIT_SCALE = "logits that are multiplied by a constant"
SINKS = "attention sinks (terms under the softmax that no key has)"
GATED = "attention whose output is gated"
CROSS = "cross attention to another network"
MANY_INPUTS = "networks for pictures or sound"
LATE_NORM = "norms of queries and keys behind their rotation"
WIDE_NORM = "norms of queries and keys over all heads at once"
SUB_NORM = "more norms inside attention and the feed-forward network"
QUERY_SCALE = "queries that grow with their position"
PLAIN_NORM = "norms without a gain"

# The models of a reason. One model may have several; only parts that every checkpoint of the model has stand here.
_MODELS = {
    EXPERTS: """afmoe aria_text cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1 ernie4_5_moe
        exaone_moe flex_olmo glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid
        granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 jamba jetmoe kimi_linear lfm2_moe llama4 llama4_text longcat_flash
        mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral olmoe phimoe qwen2_moe qwen3_5_moe
        qwen3_5_moe_text qwen3_moe qwen3_next solar_open zaya""",
    LATENT: "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4 longcat_flash minicpm3 youtu",
    RECURRENT: """bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear mamba mamba2 minimax
        nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm
        zamba zamba2""",
    CONVOLUTION: "lfm2 lfm2_moe",
    POST_NORM: """afmoe exaone4 flex_olmo gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text glm4 olmo2
        olmo3""",
    LAYER_NORM: """bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert
        codegen cohere cohere2 cohere2_moe cpmant ctrl data2vec-text dbrx electra ernie falcon fuyu git gpt-sw3 gpt2
        gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj jais2 marian mbart megatron-bert modernbert-decoder mpt mvp
        nemotron openai-gpt opt pegasus persimmon phi phimoe plbart prophetnet reformer rembert roberta
        roberta-prelayernorm roc_bert roformer rwkv stablelm starcoder2 trocr whisper xglm xlm xlm-roberta
        xlm-roberta-xl xlnet xmod""",
    NO_GATE: """apertus arcee bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small
        bloom camembert codegen cpmant ctrl data2vec-text electra ernie falcon fuyu git gpt-sw3 gpt2 gpt_bigcode gpt_neo
        gpt_neox gpt_neox_japanese gptj jais2 marian mbart megatron-bert mpt mvp nanochat nemotron openai-gpt opt
        pegasus persimmon phi plbart prophetnet rembert roberta roberta-prelayernorm roc_bert roformer starcoder2
        trocr whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod""",
    PLACES: """bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small camembert ctrl
        data2vec-text electra ernie git gpt-sw3 gpt2 gpt_bigcode gpt_neo marian mbart megatron-bert mvp openai-gpt opt
        pegasus plbart prophetnet rembert roberta roberta-prelayernorm roc_bert trocr whisper xglm xlm xlm-roberta
        xlm-roberta-xl xmod""",
    BIASES: "bloom cpmant mpt xlnet",
    PARTIAL: "glm glm4",
    SCALED: "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text recurrent_gemma vaultgemma",
    OFFSET_GAIN: "gemma gemma2 gemma3 gemma3_text nemotron recurrent_gemma vaultgemma",
    CAPPED: "nanochat recurrent_gemma",
    LOGIT_SCALE: "cohere cohere2 cohere2_moe",
    SINKS: "deepseek_v4 flint gpt_oss granite_swa granitemoe_swa hy_v4",
    GATED: "afmoe hrm_text qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
    CROSS: """bart bigbird_pegasus blenderbot blenderbot-small marian mbart mllama musicgen musicgen_melody mvp pegasus
        plbart prophetnet trocr whisper""",
    MANY_INPUTS: """emu3 fuyu gemma3 gemma3n gemma4 git got_ocr2 llama4 moss_transcribe_diarize musicgen
        musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe""",
    LATE_NORM: "hunyuan_v1_dense hunyuan_v1_moe nanochat",
    WIDE_NORM: "olmo2 olmo3 olmoe flex_olmo",
    SUB_NORM: "bitnet hyperclovax",
    QUERY_SCALE: "ministral3",
    PLAIN_NORM: "nanochat olmo",
}  # fmt: skip


def reasons(kind: str) -> list[str]:
    """The parts of a model of ``transformers`` that no decoder of ours has; none for a model that is not known here.

    >>> reasons("glm"), reasons("llama")
    (['rotary positions of a part of each head'], [])
    """
    return [reason for reason, models in _MODELS.items() if kind in models.split()]
