"""Names that settings have, or once had, elsewhere: what a message about an unknown key answers with.

Those of TRL, transformers, vLLM and verl, and those that docs/renamed.md lists. Where several are given, the
first that the program has is meant.
"""

from __future__ import annotations

from collections.abc import Mapping

RENAMED: Mapping[str, str] = {
    "reward.attempt_timeout_s": "reward.client.request_timeout_s",
    "reward.attempt_timeout_per_1k_tokens_s": "reward.client.timeout_per_1k_tokens_s",
    "reward.micro_batch_size": "reward.client.batch_rows",
    "reward.micro_batch_tokens": "reward.client.batch_tokens",
    "reward.remember": "reward.client.cache_size",
    "reward.on_failure": "reward.failure.policy",
    "reward.max_failed_fraction": "reward.failure.max_fraction",
    "rollout.memory_share": "rollout.gpu_memory_utilization",
    "rollout.window": "rollout.max_model_len",
    "rollout.eager": "rollout.enforce_eager",
    "rollout.kv_cache_gb": "rollout.kv_cache_memory_bytes",
    "rollout.logprob_gap_alarm": "rollout.logprob_diff_alarm",
    "memory_share": "gpu_memory_utilization",
    "window": "max_model_len",
    "eager": "enforce_eager",
    "kv_cache_gb": "kv_cache_memory_bytes",
    "tensor_parallel": "tensor_parallel_size",
    "lora_rank": "max_lora_rank",
    "lora_modules": "lora_target_modules",
    "grpo.sampler_correction": "grpo.correction.cap",
    "grpo.importance_sampling_cap": "grpo.correction.cap",
    "grpo.max_draws": "grpo.max_resamples",
}
"""Old name of a setting -> its present one; a rollout server's stand in no section."""

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    # the model, its data and its rewards
    "model_name": ("model.path",),
    "model_name_or_path": ("model.path",),
    "tokenizer_name_or_path": ("tokenizer.path",),
    "torch_dtype": ("model.dtype",),
    "attn_implementation": ("model.attention",),
    "lora": ("model.peft_config",),
    "use_peft": ("model.peft_config",),
    "dataset": ("data.train",),
    "dataset_name": ("data.train",),
    "train_dataset": ("data.train",),
    "eval_dataset": ("data.eval",),
    "reward_model": ("reward.url",),
    "reward_model_path": ("reward.url",),
    "reward_funcs": ("reward.url",),
    "reward_weights": ("reward.weights",),
    # the run
    "lr": ("optimizer.learning_rate",),
    "lr_scheduler_type": ("scheduler.name",),
    "warmup_steps": ("scheduler.warmup_updates",),
    "max_steps": ("train.total_steps",),
    "eval_steps": ("train.eval_every",),
    "save_steps": ("train.save_every",),
    "save_total_limit": ("train.keep_last",),
    "bf16": ("train.mixed_precision",),
    "fp16": ("train.mixed_precision",),
    "resume_from_checkpoint": ("train.resume",),
    "metric_for_best_model": ("train.best_metric",),
    "report_to": ("tracking.wandb",),
    # sampling
    "response_length": ("generation.max_new_tokens",),
    "max_completion_length": ("generation.max_new_tokens",),
    "max_tokens": ("generation.max_new_tokens",),
    "stop_strings": ("generation.stop",),
    "max_prompt_length": ("tokenizer.max_prompt_tokens",),
    "use_vllm": ("rollout.engine",),
    # algorithms
    "per_device_train_batch_size": (
        *("ppo.rollouts_per_step", "grpo.prompts_per_step", "rft.batch_size"),
        *("sft.batch_size", "ilql.batch_size", "reward_model.batch_size"),
    ),
    "micro_batch_size": ("train.gradient_accumulation_steps",),
    "beta": ("ppo.kl.coef", "grpo.kl.coef"),
    "kl_coef": ("ppo.kl.coef", "grpo.kl.coef"),
    "init_kl_coef": ("ppo.kl.coef", "grpo.kl.coef"),
    "kl_estimator": ("ppo.kl.estimator", "grpo.kl.estimator"),
    "num_ppo_epochs": ("ppo.epochs",),
    "num_iterations": ("grpo.epochs",),
    "num_mini_batches": ("ppo.minibatches",),
    "cliprange": ("ppo.clip_ratio", "grpo.clip_low"),
    "epsilon": ("grpo.clip_low", "ppo.clip_ratio"),
    "epsilon_high": ("grpo.clip_high",),
    "cliprange_value": ("ppo.clip_value",),
    "vf_coef": ("ppo.value_coef",),
    "lambda": ("ppo.lam",),
    "gae_lambda": ("ppo.lam",),
    "num_generations": ("grpo.group_size", "rft.n_generations_per_prompt"),
    "loss_type": ("grpo.loss",),
    "vllm_importance_sampling_mode": ("grpo.correction.kind",),
    "vllm_importance_sampling_correction": ("grpo.correction.kind",),
    "vllm_importance_sampling_cap": ("grpo.correction.cap",),
    "vllm_importance_sampling_clip_max": ("grpo.correction.cap",),
    "vllm_importance_sampling_clip_min": ("grpo.correction.low",),
    "rollout_is": ("grpo.correction.level",),
    "rollout_is_threshold": ("grpo.correction.cap",),
    "overlong_filter": ("grpo.overlong_buffer",),
}
"""Last part of the other name -> full names of ours."""

ALGORITHMS = ("ppo", "grpo", "rft", "ilql", "sft", "reward_model")
"""Sections that the run configs of one algorithm alone have."""
