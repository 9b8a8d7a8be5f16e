"""The sections of a run's configuration, validated and frozen.

Each trainer composes the sections it needs into its own run config (see `trainers/ppo.py`). A constructor
takes its own section, never the whole. Unknown keys are refused with the nearest valid name. `load` turns a
plain mapping into a section and pydantic's report into one readable ConfigError.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from conch.errors import ConfigError

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
OnFailure = Literal["raise", "drop", "wait"]
OnModelChange = Literal["raise", "warn", "accept"]


class Section(BaseModel):
    """Base of all sections: unknown keys refused, frozen after load, docstrings kept as descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """Which model to train, and how much of it."""

    path: str | None = None
    """Folder or hub id of the model. Give this or `architecture`."""

    revision: str | None = None
    """Hub revision (commit, tag or branch) of `path`."""

    architecture: dict[str, Any] | None = None
    """Start from random weights of this shape: the keys of the transformers config, `model_type` among
    them."""

    dtype: Dtype = "float32"
    """Precision the weights are held in. float64 is for comparing runs to the last digits: across processors,
    numbers of threads or layouts of a batch."""

    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = None
    """Kernels of attention; None takes sdpa where the model knows it, else eager. Those of flash-attention
    need its package, a CUDA GPU, and half precision, of the weights or by `train.mixed_precision`."""

    liger: bool = False
    """Compute norms, rotary embeddings and MLPs by the Triton kernels of the package liger-kernel, on a CUDA
    GPU. Changes the model's architecture for the whole process."""

    num_layers_unfrozen: int = Field(default=-1, ge=-1)
    """Transformer blocks to train, counted from the top; -1 trains everything. With a number, the reference
    of PPO shares the frozen trunk and copies only these blocks; with -1 it is a full copy."""

    disable_dropout: bool = True
    """Set every dropout to 0, so that sampling and training see the same policy."""

    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read that code."""

    peft_config: dict[str, Any] | None = None
    """Train an adapter instead of the weights: the keys of peft's `LoraConfig` (`r`, `lora_alpha`,
    `target_modules`, ...). The reference of PPO is then the model with its adapter off."""

    merge_adapter: bool = False
    """Save the adapter merged into the weights, for programs that know no adapters, instead of on its own."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of `path` and `architecture`")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("`architecture` needs `model_type` (for example gpt2)")
        if self.num_layers_unfrozen == 0:
            raise ValueError("`num_layers_unfrozen` is 0: nothing would be trained; use -1 for all layers")
        if self.peft_config is not None and self.num_layers_unfrozen != -1:
            raise ValueError(
                "`peft_config` freezes all but the adapter: leave `num_layers_unfrozen` at -1 and choose "
                "layers with `peft_config.layers_to_transform`"
            )
        return self


class TokenizerConfig(Section):
    """Which tokenizer to use."""

    path: str | None = None
    """Folder or hub id; None takes the model's."""

    pad_token: str | None = None
    """Padding token, for tokenizers that have none. Must be in the vocabulary and should differ from eos."""

    truncation_side: Literal["left", "right"] = "left"
    """Which end of a too long prompt is cut when `truncate_prompts` allows it."""

    truncate_prompts: bool = False
    """Cut prompts that do not fit the model's window instead of refusing them."""

    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens, where that shall be less than the window leaves."""


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""

    eps: float = Field(default=1e-5, gt=0)
    """Added to the denominator; 1e-5 is the value of the original PPO code."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, applied to matrices only (not to biases and norms)."""


class SchedulerConfig(Section):
    """Learning rate over the run, stepped once per optimizer update."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up: flat, or falling to 0 at the run's last update."""

    warmup_updates: int = Field(default=0, ge=0)
    """Optimizer updates over which the rate rises linearly from 0."""


class GenerationConfig(Section):
    """How completions are sampled."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Longest completion, in tokens."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, in sampling and in the log-probs that are trained on."""

    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 turns it off."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this much probability; 1 turns it off."""

    stop: tuple[str, ...] = ()
    """Stop strings: the completion ends before the first of them."""

    chunk_size: int = Field(default=64, ge=1)
    """Prompts generated at once per process. A served reward is asked for as soon as a completion has ended,
    a Python function's when its chunk has, while the next is generated."""

    @property
    def cuts(self) -> bool:
        """Whether some tokens of the policy's are never sampled."""
        return self.top_k > 0 or self.top_p < 1.0


class RolloutConfig(Section):
    """What samples the completions that are learned from and evaluated on."""

    engine: Literal["hf", "vllm"] = "hf"
    """`hf` samples with the policy itself in the trainer's processes; `vllm` with vLLM, in them too, or on
    the servers of `urls`."""

    urls: str | None = None
    """`host:port` of a vLLM server (`python -m conch.rollouts.serve`), or several, `host1:port,host2:port`.
    None runs vLLM in each of the trainer's processes, on its GPU."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of vLLM's weights; `auto` takes the one that the policy is trained in. A server has its
    own."""

    window: int | None = Field(default=None, ge=2)
    """Longest prompt and completion together, in tokens; less than the model's window saves memory. None
    takes the model's. A server has its own."""

    memory_share: float = Field(default=0.3, gt=0, lt=1)
    """Part of a GPU's memory that vLLM may take beside the trainer, its weights included."""

    kv_cache_gb: float | None = Field(default=None, gt=0)
    """GiB for keys and values, instead of what `memory_share` leaves; None takes 1 on a CPU."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Completions that vLLM samples at once, per process."""

    eager: bool | None = None
    """True neither compiles nor records graphs: vLLM starts at once and samples more slowly. None is eager on
    a CPU alone."""

    sleep_level: Literal[0, 1, 2] = 2
    """What vLLM gives back of a GPU's memory while the trainer computes: 1 the cache, and the weights go to
    the CPU's memory; 2 both; 0 nothing. On a CPU nothing can be given back."""

    weights: Literal["broadcast", "files"] = "broadcast"
    """How servers get the weights after an update: `broadcast` sends them over the network (gloo, or NCCL
    between GPUs); `files` writes them to shared memory, for servers on the trainer's machine."""

    merge_adapter: bool | None = None
    """False hands a LoRA adapter over by itself, wherever vLLM can take it, and its base once; True merges it
    and hands all weights over each time. None leaves it to servers (their `lora_rank`), and in the trainer's
    processes merges on a CPU alone, where sampling through an adapter costs more than that."""

    deadline_s: float = Field(default=600.0, gt=0)
    """Seconds without a new completion from any server after which sampling gives up, and the longest that a
    server may take for new weights."""

    logprob_gap_alarm: float | None = Field(default=0.1, gt=0)
    """Nats of `rollout/logprob_gap` above which a warning is written; None writes none."""

    @model_validator(mode="after")
    def _servers_run_vllm(self) -> RolloutConfig:
        if self.urls is not None and self.engine != "vllm":
            raise ValueError("`rollout.urls` names vLLM servers: set `rollout.engine=vllm`, or leave it out")
        return self


class EvalGenerationConfig(Section):
    """How completions for evaluation are sampled, where it differs from `generation`.

    One of these may be a list: each value is then evaluated, and its metrics are named `...@key=value`.
    """

    max_new_tokens: int | list[int] | None = None
    """As in `generation`; None takes what stands there."""

    temperature: float | list[float] | None = None
    """As in `generation`; None takes what stands there."""

    top_k: int | list[int] | None = None
    """As in `generation`; None takes what stands there."""

    top_p: float | list[float] | None = None
    """As in `generation`; None takes what stands there."""

    do_sample: bool | list[bool] = True
    """False takes the likeliest token at each step (greedy decoding)."""

    @model_validator(mode="after")
    def _one_list(self) -> EvalGenerationConfig:
        swept = [name for name in type(self).model_fields if isinstance(getattr(self, name), list)]
        if len(swept) > 1:
            raise ValueError(f"only one key may be a list, not both `{swept[0]}` and `{swept[1]}`")
        if swept and not getattr(self, swept[0]):
            raise ValueError(f"`{swept[0]}` is an empty list: give the values to evaluate")
        return self


class TlsConfig(Section):
    """Certificates (PEM files) for a server that speaks TLS. Without `ca` the connection is plain text."""

    ca: Path | None = None
    """Authority that signed the server's certificate, or that certificate itself."""

    cert: Path | None = None
    """Our own certificate, for servers that ask for one (mutual TLS)."""

    key: Path | None = None
    """The private key of `cert`, not encrypted."""

    @model_validator(mode="after")
    def _complete(self) -> TlsConfig:
        if (self.cert is None) != (self.key is None):
            raise ValueError("`tls.cert` and `tls.key` belong together: give both or neither")
        if self.cert is not None and self.ca is None:
            raise ValueError("`tls.cert` needs `tls.ca`: without it nothing is encrypted")
        return self


class RewardConfig(Section):
    """Where rewards come from and what to do when they do not come."""

    url: str | None = None
    """`host:port/model` of a served reward model, or `host1:port,host2:port/model` for several servers of the
    same model; `http://host:port/path` of an endpoint that speaks JSON. None takes the TRITON_HOST
    environment variable. Unused when a Python function is passed."""

    dialect: Literal["query", "goals"] = "query"
    """Of an HTTP endpoint: `query` sends {"query": [sample, ...]} and reads {"rewards": [number, ...]};
    `goals` sends [sample, ...] and reads {goal: [number, ...]}."""

    members: dict[str, str] = Field(default_factory=dict)
    """Several rewards instead of one `url`: name -> what `url` may be. `combine` makes one of them."""

    combine: Literal["sum", "mean", "wco", "uwo"] = "sum"
    """Of several named rewards: `sum` them with `weights`, or take them for an ensemble whose reward is the
    `mean` of their scores, the least (`wco`), or the mean less `uwo_weight` times the variance (`uwo`)."""

    uwo_weight: float = Field(default=0.1, ge=0)
    """With `combine=uwo`: what a variance of 1 costs."""

    on_member_failure: Literal["fail", "renormalise"] = "fail"
    """A sample that a member of an ensemble does not score: `fail` gives it the member's failure,
    `renormalise` the objective over the others, counted as `reward/degraded_fraction`."""

    tls: TlsConfig = Field(default_factory=TlsConfig)
    """Certificates for a served reward model whose server speaks TLS."""

    secret_env: str | None = None
    """Environment variable that holds the secret which the server asks for; None sends none."""

    headers_env: dict[str, str] = Field(default_factory=dict)
    """Header -> environment variable that holds its value, sent with every request to a served model; values
    are not logged. For proxies that ask for a token: `authorization: MY_TOKEN`."""

    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Longest wait for a connection to a server, in seconds."""

    attempt_timeout_s: float = Field(default=10.0, gt=0)
    """Deadline of one request, in seconds, beside what its length adds."""

    attempt_timeout_per_1k_tokens_s: float = Field(default=2.0, ge=0)
    """Added to `attempt_timeout_s` and `deadline_s` for every 1,000 tokens in the request and in those that
    the server works on before it, in seconds, so that long samples are not the ones that get lost. Raise it
    for a slow server; 4 bytes of text count as a token."""

    deadline_s: float = Field(default=60.0, gt=0)
    """Deadline of one micro-batch with all its retries, in seconds, beside what its length adds."""

    max_in_flight: int = Field(default=4, ge=1)
    """Requests a process keeps under way at once, per server."""

    micro_batch_size: int = Field(default=64, ge=1)
    """Samples per request, at most; lowered to the server's own limit."""

    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Tokens per request, at most, padding among them; a longer sample goes alone. 4 bytes of text count as a
    token."""

    max_request_mb: float = Field(default=64.0, gt=0)
    """Largest request, in millions of bytes: more is sent in several, and a sample beyond it is not
    scored."""

    remember: int = Field(default=10_000, ge=0)
    """Latest scores of a served model that are kept, to answer equal samples without asking."""

    score_range: tuple[float, float] | None = None
    """Lowest and highest score that a served model can give; another is no score. None takes any finite
    one."""

    on_model_change: OnModelChange = "raise"
    """When a server turns out to serve another version or content than at the start: `raise` stops the run,
    `warn` says so and goes on, `accept` goes on."""

    on_failure: OnFailure = "raise"
    """`raise`: every process leaves with the reason. `drop`: failed samples leave the loss, within
    `max_failed_fraction`. `wait`: keep asking a server that is away, for at most `wait_budget_s`."""

    max_failed_fraction: float = Field(default=0.1, ge=0, le=1)
    """With `drop`: more failures than this share of a step's samples stop the run."""

    wait_budget_s: float = Field(default=3600.0, gt=0)
    """With `wait`: longest outage to sit out, in seconds."""

    checkpoint_after_s: float = Field(default=300.0, ge=0)
    """With `wait`: seconds of an outage after which a checkpoint is saved, from which the interrupted step
    (or evaluation) can be done again. One is saved as well when the budget is spent."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Objective -> weight in the sum, for rewards with several objectives; unnamed objectives weigh 1."""

    record: bool = False
    """Write a line for every score to `rewards.jsonl` in the run folder: step, sample hash, model, version,
    status, latency, values; no texts."""

    replay: Path | None = None
    """A run's folder, or its `rewards.jsonl`: take the rewards that it recorded instead of asking anybody."""

    delta: bool = False
    """The reward of a sample is its score less that of a reference answer to the same prompt: each prompt is
    a dict with an `original_output`, whose score is asked for once."""

    dense: bool = False
    """Take the scores of steps or tokens from a served model that gives them (converted with --granularity):
    each goes to the token of the response in which its step ends. False takes the one score of a sample."""

    @model_validator(mode="after")
    def _dense_fits(self) -> RewardConfig:
        if self.dense and self.delta:
            raise ValueError("`delta` is a difference of two scores, `dense` gives more: set one of them")
        if self.dense and self.score_range and not self.score_range[0] <= 0 <= self.score_range[1]:
            raise ValueError("`score_range` must hold 0 with `dense`: tokens that end no step get it")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> RewardConfig:
        if self.url is not None and self.members:
            raise ValueError("give `url` for one reward or `members` for several, not both")
        return self

    @model_validator(mode="after")
    def _range_in_order(self) -> RewardConfig:
        if self.score_range is not None and not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"`score_range` is (lowest, highest), not {self.score_range}")
        return self


class TrainConfig(Section):
    """Length, numerics and housekeeping of a run."""

    seed: int = Field(default=0, ge=0)
    """Seeds weights, data order and sampling; each rank adds its number to it for sampling."""

    total_steps: int = Field(default=100, ge=1)
    """Steps of the trainer's loop: optimizer updates offline; one rollout with all its updates for PPO; one
    selection with its updates for RFT."""

    output_dir: Path = Path("outputs")
    """A run's folder is made below: `<output_dir>/<date>/<time>/`."""

    run_dir: Path | None = None
    """Exact folder of the run instead; must not hold another run, unless `resume` continues it."""

    resume: str | None = None
    """Go on with an interrupted run, exactly where a checkpoint left it: the folder of a run or of one of its
    checkpoints, or `auto` for the run in `run_dir` (without one: the newest below `output_dir`), which starts
    anew where there is none."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per optimizer update; changes memory, not the result."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Autocast precision; None takes what `accelerate launch` was told."""

    num_processes: int | None = Field(default=None, ge=1)
    """Processes this run must have; any other number is refused (some launchers silently start one)."""

    eval_every: int = Field(default=0, ge=0)
    """Evaluate every so many steps, and at the start and end; 0 never evaluates."""

    eval_repeats: int = Field(default=1, ge=1)
    """Completions sampled per evaluation prompt."""

    save_every: int = Field(default=0, ge=0)
    """Save a checkpoint every so many steps; 0 saves only the last. The end of the run always saves."""

    keep_last: int | None = Field(default=None, ge=1)
    """Checkpoints to keep beside the best one; older ones are deleted. None keeps all."""

    best_metric: str | None = None
    """Evaluation metric by which the best checkpoint is chosen, for example `eval/reward`; lower is better
    for names that end in `loss`, else higher. None takes the trainer's own choice: the first metric of
    `metric_fn`, else `eval/reward`; offline `eval/loss` or the reward model's accuracy or correlation."""

    early_stopping: int = Field(default=0, ge=0)
    """Stop after so many evaluations in a row without a better `best_metric`; 0 never stops early."""


class DataConfig(Section):
    """What a trainer's own command line reads; from Python the data is passed directly, and of these keys
    `min_tokens` and `max_tokens` alone count."""

    train: str | None = None
    """Training rows: a `.txt`, `.jsonl`, `.json` (these also as `.gz`), `.csv` or `.parquet` file, a folder,
    or a dataset of the Hugging Face hub, `owner/name` or `owner/name:split`. docs/data.md has the forms of
    rows."""

    eval: str | None = None
    """Evaluation rows, in the same forms."""

    subset: str | None = None
    """Configuration of a hub dataset that has several (`main` of `openai/gsm8k`)."""

    folder: str | None = None
    """Folder of a hub dataset to read instead of all (`harmless-base` of `Anthropic/hh-rlhf`)."""

    revision: str | None = None
    """Commit, tag or branch of a hub dataset."""

    streaming: bool = False
    """Read a hub dataset's rows as they come, without a copy on the disk: with `max_rows`, no more is fetched
    than is used."""

    max_rows: int | None = Field(default=None, ge=1)
    """Training rows to take, the first ones; None takes all."""

    max_eval_rows: int | None = Field(default=None, ge=1)
    """Evaluation rows to take, the first ones; None takes all."""

    min_tokens: int = Field(default=0, ge=0)
    """Shorter training rows (prompts, for trainers that sample) are left out, and counted; in tokens."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Longer ones are left out instead of being cut, and counted; in tokens."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _path_as_text(cls, source: Any) -> Any:
        return str(source) if isinstance(source, Path) else source

    @model_validator(mode="after")
    def _some_length_is_left(self) -> DataConfig:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"`max_tokens` = {self.max_tokens} is below `min_tokens` = {self.min_tokens}: no row is left"
            )
        return self


class TrackingConfig(Section):
    """Where metrics go. `metrics.jsonl` in the run folder is always written."""

    wandb: bool = False
    """Log to Weights & Biases; never asks for a login: without credentials the run is logged offline."""

    tensorboard: bool = False
    """Log to TensorBoard event files in the run folder."""

    project: str = "conch"
    """Weights & Biases project."""

    sample_rows: int = Field(default=16, ge=0)
    """Rows of each table of samples written to `samples/`."""

    rollouts: bool = False
    """Write every rollout that is trained on to `rollouts/step_N.jsonl`, with its reward and KL."""


class RunConfig(Section):
    """The sections that every trainer's run has; each trainer adds its own."""

    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()


SectionT = TypeVar("SectionT", bound=Section)


def load(section: type[SectionT], values: Mapping[str, Any]) -> SectionT:
    """Validate a plain mapping into `section`.

    Raises:
        ConfigError: one line per mistake: the key's full name, what is wrong, and for an unknown key the
            nearest valid one.
    """
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(section, dict(problem)) for problem in error.errors()]
        raise ConfigError("configuration not valid:\n  " + "\n  ".join(lines)) from None


def _explain(section: type[Section], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or section.__name__
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{key}`; {_nearest(section, location)}"
    if problem["type"] == "missing":
        return f"`{key}` is missing"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"`{key}`: {message}{shown}"


def _nearest(section: type[Section], location: list[str]) -> str:
    owner: Any = section
    for part in location[:-1]:
        field = owner.model_fields.get(part) if hasattr(owner, "model_fields") else None
        owner = field.annotation if field else None
    names = list(getattr(owner, "model_fields", {}))
    close = difflib.get_close_matches(location[-1], names, n=1)
    if close:
        return f"did you mean `{'.'.join([*location[:-1], close[0]])}`?"
    return f"valid here: {', '.join(names)}"
