"""The fields of a ``config.json`` that change nothing a plan counts; every other one that is set has to be read.

Such as dropout, how weights begin, numbers of tokens, scales of results, and what older versions of transformers wrote
into each file. A field that is neither here nor read may say anything: it is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from diffattn.config_fields import shown
from diffattn.errors import ConfigError

UNCOUNTED = frozenset({
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "tokenizer_class",
    "vocab_file", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
    "cls_token_id", "mask_token_id", "image_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "id2label", "label2id",
    "num_labels", "problem_type", "finetuning_task", "task_specific_params", "return_dict",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_past",
    "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "gradient_checkpointing",
    "use_flash_attention", "is_decoder", "is_encoder_decoder", "cross_attention_hidden_size", "prefix",
    "pruned_heads", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "remove_invalid_values",
    "exponential_decay_length_penalty", "attention_dropout", "hidden_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "residual_dropout", "embedding_dropout", "dropout", "dropout_p", "initializer_range", "initializer_factor",
    "w_init_variance_scale", "final_w_init_variance_scale", "lambda_std_dev", "mamba_dt_min", "mamba_dt_max",
    "mamba_dt_init_floor", "rescale_prenorm_residual", "hidden_act", "hidden_activation", "activation_function",
    "mlp_hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon",
    "attn_rms_norm_eps", "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling",
    "lm_head_multiplier", "mlp_multipliers", "key_multiplier", "attention_out_multiplier",
    "attention_in_multiplier", "ssm_multipliers", "ssm_in_multiplier", "ssm_out_multiplier",
    "attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "query_pre_attn_scalar",
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "swiglu_alpha",
    "swiglu_limit", "scale_emb", "logit_softcap", "polynorm_output_scale", "polynorm_bias_clamp", "hidden_clamp",
    "mhc_sinkhorn_iters", "rope_theta", "rope_scaling", "rope_parameters", "rope_interleave",
    "rope_local_base_freq", "rotary_pct", "rotary_emb_base", "partial_rotary_factor", "max_position_embeddings",
    "original_max_position_embeddings", "original_seq_len", "rope_factor", "mscale", "swa_rope_theta", "fused_rope",
    "initial_context_length", "seq_length", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits",
    "norm_topk_prob", "routed_scaling_factor", "scoring_func", "score_func", "topk_method", "topk_group", "n_group",
    "aux_loss_alpha", "seq_aux", "ep_size", "route_norm", "route_scale", "load_balance_coeff",
    "score_before_experts", "num_logits_to_keep", "time_step_limit", "time_step_min", "time_step_max",
    "time_step_floor", "mamba_chunk_size", "mamba_norm_before_gate", "use_mamba_kernels", "mamba_use_mlp",
    "cache_implementation", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "use_parallel_residual", "n_ctx", "qk_head_dim", "pretraining_tp", "patch_size",
    "unsloth_version", "unsloth_fixed", "is_llama_config", "rope_interleaved", "transformers.js_config",
    "full_attn_mod", "interpolate_factor", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
    "mlp_expansion_factor", "attn_implementation", "neftune_noise_alpha", "max_seq_len", "max_sequence_length",
    "model_max_length", "rope_percent",
})  # fmt: skip
# What plain decoders with a gated network are read by; a window that their type does not look at counts for nothing.
PLAIN = frozenset({
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern", "no_rope_layers",
    "no_rope_layer_interval",
})  # fmt: skip


def check_known(values: Mapping[str, object], read: Collection[str], kind: object, file: str) -> None:
    """Raises unless every field that is set is one that was read, or one that changes nothing.

    Names that begin with an underscore are the library's own notes.

    Raises:
        ConfigError: a field that is neither, with its name.

    >>> check_known({"hidden_size": 8, "attention_dropout": 0.1, "new_part": None}, PLAIN, "llama", "config.json")
    """
    for key, value in values.items():
        if value in (None, False, 0, "") or value == [] or value == {} or key.startswith("_"):
            continue
        if key not in read and key not in UNCOUNTED:
            raise ConfigError(
                f"{file!r} has model_type {kind!r} and {key}={shown(value)}, which may change what is counted",
                "fields that are known",
                f"remove {key} if the model is a plain {kind}",
            )
