"""The parts of a recipe: where the rows come from, how training goes, how text is written; processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.config.checks import check_types
from lorica.errors import ConfigError

if TYPE_CHECKING:
    pass


QUANTIZATIONS = ("nf4", "fp4", "int8")

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The origin of the rows, and the columns that matter.

    Args:
        preset: name of a data set that lorica knows, such as "glue/rte": its task, place, columns, labels and
            metric take the place of what is left at its default here.
        train: training rows: a csv, tsv, json, jsonl, txt, conll (each also .gz, .zst, .bz2, .xz or .zip),
            xlsx, parquet or arrow file; a folder of such files named after their splits, of images or texts
            in folders named after their classes, of images listed in metadata.csv, or one that datasets
            saved; a data set's name on the Hugging Face Hub; or "docstrings", the data set made from
            Python's own docstrings. ``#NAME`` after it takes its split, or a workbook's sheet, of that name.
        validation: validation rows, in any of these forms. None takes the split of that name from `train`, or
            a part of its rows.
        test: test rows, in any of these forms. None takes the split of that name from `train`, if it has one.
        subset: configuration of a Hub data set that has several, such as "sst2" of "nyu-mll/glue".
        encoding: encoding of text files, such as "cp1251". None takes that of their byte-order mark, else
            UTF-8, else cp1252, which is then said.
        columns: names of the columns of csv, tsv and xlsx files that do not begin with them. None takes their
            first line.
        text: column of the input: the text, the prompt, the messages, the list of words, an image or its
            path. None looks for the usual names.
        text_pair: column of the second text, where a row is a pair; of the second part of a prompt, such as
            Alpaca's ``input``. None looks for the usual names when `text` is None too.
        system: column of the system message before a prompt or a conversation. None looks for
            the usual names.
        label: column of the target: the class, the number, the completion, the text to write, the
            list of classes. None looks for the usual names.
        chosen: column of the better answer to a prompt, of preferences. None looks for the usual names.
        rejected: column of the worse one. None looks for the usual names.
        verdict: column that says whether an answer is wanted, of answers that were judged alone. None looks
            for the usual names.
        tools: column of the tools that a conversation may call, for the chat template. None looks for the
            usual names.
        messages: whether rows are conversations, which the model's chat template lays out; a text among them
            is then what a user says, or the assistant in the place of an answer. None looks at the training
            rows; where they are, that is kept for predictions.
        template: how a row is laid out for a language model: a text with columns in braces, such as
            "Q: {question} A: {answer}", or Jinja, or a file of it (.jinja). The label's column is learned
            where it stands, in Jinja what {% generation %} marks; where neither does, the template is the
            prompt of the label, or else raw text.
        running: whether a .txt file is one running text, such as a book, whose pieces follow on. None takes
            it for one where blank lines stand between paragraphs, if the task learns raw text; else each of
            its lines is a text.
        continues: column that says whether a row's raw text continues from the row before it. None looks for
            that name.
        references: column of lists of texts, each of which would be right: where rows have it, it takes the
            place of a language task's `label`.
        separator: text between a prompt and its completion. May hold special tokens of the model.
        stride: tokens that neighbouring windows of a long text share, in question answering. None takes a
            quarter of a window.
        unanswerable: whether a question may have no answer in its text. None looks at the training rows.
        labels: names of the classes in the order of their ids. None takes those found in the training rows,
            sorted.
        validation_fraction: share of the training rows set aside, in (0, 1), when there is no validation
            split; 0 sets none aside.
        split_seed: seed of that draw, and of the parts that `fraction` and the numbers of rows keep.
        fraction: share of the training rows to learn from, in (0, 1]. None takes all.
        train_rows: number of training rows to learn from. None takes all.
        validation_rows: number of validation rows to score. None takes all.
        test_rows: number of test rows to score. None takes all.
        streaming: leave the rows of a language task on disk, and read and encode those of a batch when it is
            their turn: for data larger than memory. Before training the first 1,000 are looked at.
        skip_bad: leave out rows that cannot be used, and count them, in place of refusing them all.
        cache: keep encoded rows in a folder of the user's (``LORICA_CACHE``, or ``~/.cache/lorica``), and
            take them from there, mapped into memory, when the same rows come again.
        processes: in which rows are encoded side by side, where there are more than 20,000 and each is
            encoded by itself. The encoded rows are the same.
    """

    preset: str | None = None
    train: str = "docstrings"
    validation: str | None = None
    test: str | None = None
    subset: str | None = None
    encoding: str | None = None
    columns: list[str] | None = None
    text: str | None = None
    text_pair: str | None = None
    system: str | None = None
    label: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    verdict: str | None = None
    tools: str | None = None
    messages: bool | None = None
    template: str | None = None
    running: bool | None = None
    continues: str | None = None
    references: str = "references"
    separator: str = "\n"
    stride: int | None = None
    unanswerable: bool | None = None
    labels: list[str] | None = None
    validation_fraction: float = 0.1
    split_seed: int = 0
    fraction: float | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    streaming: bool = False
    skip_bad: bool = False
    cache: bool = False
    processes: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        as_texts(self, "train", "validation", "test")
        check_types(self, "data.")
        expect(self, "validation_fraction", 0 <= self.validation_fraction < 1, "a share in [0, 1)")
        expect(self, "processes", self.processes > 0, "more than 0")
        expect(self, "stride", self.stride is None or self.stride >= 0, "None, or 0 or more")
        expect(self, "fraction", self.fraction is None or 0 < self.fraction <= 1, "a share in (0, 1]")
        for name in ("train_rows", "validation_rows", "test_rows"):
            rows = getattr(self, name)
            expect(self, name, rows is None or rows > 0, "None or more than 0")
        alone = self.fraction is None or self.train_rows is None
        expect(self, "train_rows", alone, "None where fraction is given")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the training. AdamW, with a checkpoint at each evaluation.

    Args:
        learning_rate: peak learning rate. None chooses it by the method and the model's width (see
            `lorica.train.trainer.arguments`): LoRA likes about ten times that of full fine-tuning.
        epochs: passes over the training rows. None takes 3, or as many as few rows need to be learned.
        max_steps: optimizer steps to take, in place of `epochs`. None lets `epochs` decide.
        batch_size: rows per step on each device.
        auto_batch_size: halve `batch_size` while a step on the longest rows does not fit into memory, and
            gather as many more batches per step: the rows per step stay the same.
        eval_batch_size: rows per batch in evaluation, on each device.
        gradient_accumulation: batches whose gradients are added up for one step.
        weight_decay: AdamW's decay of weight matrices, per step and unit of learning rate; biases and norms
            have none.
        warmup_ratio: share of the steps, in [0, 1), over which the learning rate climbs to its peak.
        lr_scheduler: course of the learning rate after that: "linear", "cosine", "constant",
            "constant_with_warmup", "polynomial" or "inverse_sqrt".
        max_grad_norm: norm to which larger gradients are scaled down; 0 leaves them.
        max_length: tokens kept of each row; the number of rows cut is reported.
        seed: seed of the new head, the adapter, the order of rows and dropout.
        start_batches: batches of training rows that a start from data looks at before training, where
            `init_lora_weights` is "eva", "corda" or "lora_ga".
        eval_steps: steps between evaluations. None evaluates once per epoch.
        save_steps: steps between checkpoints, besides the one at each evaluation. None writes no others.
        save_total_limit: checkpoints to keep: the newest, and always the best.
        early_stopping_patience: evaluations without a better result after which training stops. None never
            stops early.
        metric_for_best: metric that decides which checkpoint is the best, "loss" included. None takes the
            task's own.
        load_best: end with the best checkpoint instead of the last.
        loraplus_lr_ratio: learning rate of B over that of A (LoRA+; Hayou et al., 2024, advise 2 to 16). None
            or 1 trains both at one rate.
        chunked_loss: compute a language model's loss a few tokens at a time, without the matrix of all
            logits: the same loss and gradients in a fraction of the memory.
        packing: put several training rows of a causal language model into one sequence, each with positions
            and attention of its own: the same loss, hardly any padding. `batch_size` then counts sequences.
        packed_length: tokens of a packed sequence. None takes `max_length`.
        group_by_length: put rows of similar lengths into one batch, which saves padding. None does so where
            the loss is a mean over rows (classes, numbers, spans), and draws rows at random where it is one
            over tokens (texts that are written, tagged words), and for preferences and rewards.
        bf16: bfloat16 autocast. Needs a device that has it.
        fp16: float16 autocast with loss scaling. Needs a GPU.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more
            time.
        logging_steps: steps between log entries.
        report_to: trackers that receive them: "tensorboard", "wandb", "mlflow", ... An empty list is none.
        arguments: any other fields of transformers.TrainingArguments, passed on as they are.
    """

    learning_rate: float | None = None
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 16
    auto_batch_size: bool = False
    eval_batch_size: int = 64
    gradient_accumulation: int = 1
    weight_decay: float = 0.0
    warmup_ratio: float = 0.06
    lr_scheduler: str = "linear"
    max_grad_norm: float = 1.0
    max_length: int = 128
    seed: int = 0
    start_batches: int = 16
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 2
    early_stopping_patience: int | None = None
    metric_for_best: str | None = None
    load_best: bool = True
    loraplus_lr_ratio: float | None = None
    chunked_loss: bool = True
    packing: bool = False
    packed_length: int | None = None
    group_by_length: bool | None = None
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values."""
        check_types(self, "training.")
        for name in (
            "batch_size",
            "start_batches",
            "eval_batch_size",
            "gradient_accumulation",
            "max_length",
            "logging_steps",
        ):
            expect(self, name, getattr(self, name) > 0, "more than 0")
        for name in (
            "learning_rate",
            "epochs",
            "max_steps",
            "eval_steps",
            "save_steps",
            "early_stopping_patience",
            "loraplus_lr_ratio",
        ):
            value = getattr(self, name)
            expect(self, name, value is None or value > 0, "None or more than 0")
        for name in ("weight_decay", "max_grad_norm"):
            expect(self, name, getattr(self, name) >= 0, "0 or more")
        expect(self, "save_total_limit", self.save_total_limit >= 1, "at least 1")
        expect(self, "warmup_ratio", 0 <= self.warmup_ratio < 1, "a share in [0, 1)")
        expect(self, "lr_scheduler", self.lr_scheduler in SCHEDULERS, f"one of {SCHEDULERS}")
        ends = self.lr_scheduler == "polynomial" and "lr_scheduler_kwargs" not in self.arguments
        expect(
            self,
            "learning_rate",
            not ends or self.learning_rate is None or self.learning_rate > 1e-7,
            "more than 1e-7, where the polynomial schedule ends",
        )
        packed = self.packed_length is None or (self.packing and self.packed_length >= self.max_length)
        expect(
            self, "packed_length", packed, f"None, or max_length ({self.max_length}) or more, with packing"
        )
        expect(self, "fp16", not (self.fp16 and self.bf16), "False where bf16 is True")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings by which text is written, and its scores.

    The most likely token each time, unless this says otherwise: a model's own generation_config.json is asked
    for its special tokens, and for nothing else.

    Args:
        metrics: scores of the model's texts, in each evaluation: any of "bleu", "nist", "ter", "rouge",
            "meteor", "rouge_l", "cider", "exact_match", "f1", "logical_form". Empty writes nothing there, and
            leaves loss and perplexity.
        max_new_tokens: tokens written at most.
        num_beams: continuations kept in beam search; 1 searches none.
        length_penalty: exponent of the length by which a beam's log-likelihood is divided: above 0 favours
            long texts.
        no_repeat_ngram_size: no run of so many tokens is written twice; 0 allows all.
        repetition_penalty: divisor of the odds of tokens that were there before; 1 is none.
        do_sample: draw tokens instead of taking the most likely.
        temperature: divisor of the logits in drawing; below 1 is more certain.
        top_k: draw from so many of the most likely tokens; 0 is all.
        top_p: draw from the most likely tokens that together have this probability; 1 is all.
        batch_size: prompts that are written for at once, on each device.
        eval_rows: prompts written for in an evaluation during training, the first ones. None takes all; the
            scores after training always rest on all.
        arguments: any other fields of transformers.GenerationConfig, passed on as they are.
    """

    metrics: list[str] = field(default_factory=list)
    max_new_tokens: int = 64
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    batch_size: int = 16
    eval_rows: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values."""
        of = "generation."
        check_types(self, of)
        for name in ("max_new_tokens", "num_beams", "batch_size", "repetition_penalty", "temperature"):
            expect(self, name, getattr(self, name) > 0, "more than 0", of)
        for name in ("no_repeat_ngram_size", "top_k"):
            expect(self, name, getattr(self, name) >= 0, "0 or more", of)
        expect(self, "top_p", 0 < self.top_p <= 1, "a probability in (0, 1]", of)
        expect(self, "eval_rows", self.eval_rows is None or self.eval_rows > 0, "None or more than 0", of)


PAIRED = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
"""Losses of pairs of answers that are measured against a reference; TRL's DPOTrainer has them."""

JUDGED = ("kto", "apo_zero_unpaired")
"""Losses of answers that were judged alone, against a reference; TRL's KTOTrainer has them."""

FREE = ("simpo", "cpo", "orpo")
"""Losses of pairs without a reference; TRL has them among its experiments."""

GROUPED = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
"""Losses of TRL's GRPOTrainer."""

LOSSES = (*PAIRED, *JUDGED, *FREE, *GROUPED)


@dataclass(frozen=True, kw_only=True)
class PostConfig:
    """Preferences and rewards: the loss, and for reinforcement where answers and their rewards come from.

    The reference is the adapter's own start, on the same base.

    Args:
        loss: of preferences "sigmoid" (DPO), "ipo", "hinge", "robust" or another that TRL's DPOTrainer has,
            "kto" for answers that were judged alone, or "simpo", "cpo", "orpo", which need no reference; of
            grpo "dapo", "grpo", "dr_grpo" or another that TRL's GRPOTrainer has. None takes "sigmoid" for
            pairs, "kto" for judged answers, "dapo" for grpo.
        beta: pull towards the reference. None takes TRL's: 0.1 for DPO and KTO, 0 for grpo, 0.05 for rloo.
        label_smoothing: share of preferences, in [0, 0.5), that are taken to be the wrong way round.
        rewards: what scores an answer: functions as ``path/to/file.py:function`` or
            ``package.module:function``; folders of runs of the task reward, whose adapter joins this base.
        reward_weights: weight of each reward in their sum. None weighs them alike.
        generations: answers to each prompt, that are compared with one another.
        max_new_tokens: tokens of an answer at most.
        temperature: divisor of the logits in drawing answers.
        top_p: draw from the most likely tokens that together have this probability; 1 is all.
        arguments: any other fields of TRL's configuration (DPOConfig, KTOConfig, CPOConfig, ORPOConfig,
            RewardConfig, GRPOConfig, RLOOConfig), passed on as they are.
    """

    loss: str | None = None
    beta: float | None = None
    label_smoothing: float = 0.0
    rewards: list[str] = field(default_factory=list)
    reward_weights: list[float] | None = None
    generations: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values."""
        of = "post."
        check_types(self, of)
        expect(self, "loss", self.loss is None or self.loss in LOSSES, f"None or one of {LOSSES}", of)
        expect(self, "beta", self.beta is None or self.beta >= 0, "None, or 0 or more", of)
        expect(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "a share in [0, 0.5)", of)
        expect(self, "generations", self.generations > 1, "at least 2", of)
        expect(self, "max_new_tokens", self.max_new_tokens > 0, "more than 0", of)
        expect(self, "temperature", self.temperature > 0, "more than 0", of)
        expect(self, "top_p", 0 < self.top_p <= 1, "a probability in (0, 1]", of)
        weights = self.reward_weights
        alike = weights is None or len(weights) == len(self.rewards)
        expect(self, "reward_weights", alike, f"a weight for each of the {len(self.rewards)} rewards", of)


ENGINES = ("ddp", "fsdp2", "ray")
"""Ways in which the processes of a run share its model, and who starts them."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """The processes that a command runs in.

    Args:
        processes: on each machine: one for each GPU, or several that share a CPU's cores. None is this one.
        machines: number of machines; the command is given on each of them.
        address: of the first machine, as host:port, where the others find it; of a cluster of Ray's.
        engine: "ddp", each process holds the model whole; "fsdp2", each holds a part of every weight, and
            has a block's others sent while it computes; or "ray", as "ddp" in workers of Ray's, here or in
            the cluster at `address` ("auto": the one that runs here), started again where one is lost.
        retries: how often lost workers of Ray's are started again.
    """

    processes: int | None = None
    machines: int = 1
    address: str | None = None
    engine: str = ENGINES[0]
    retries: int = 3

    def __post_init__(self) -> None:
        """Check the values."""
        of = "launch."
        check_types(self, of)
        expect(self, "engine", self.engine in ENGINES, f"one of {ENGINES}", of)
        expect(self, "retries", self.retries >= 0, "0 or more", of)
        expect(self, "processes", self.processes is None or self.processes > 0, "None or more than 0", of)
        expect(self, "machines", self.machines > 0, "more than 0", of)
        if self.processes is None and (self.machines > 1 or self.address is not None):
            raise ConfigError(
                "launch.machines and launch.address need launch.processes, those on each machine"
            )
        if self.engine == "ray":
            expect(self, "processes", self.processes is not None, "a number of Ray's workers", of)
            expect(self, "machines", self.machines == 1, "1 with Ray, which finds the machines itself", of)
        elif (self.machines > 1) != (self.address is not None):
            raise ConfigError(
                "launch.machines and launch.address belong together: --launch.address host:port"
            )


def as_texts(config: Any, *names: str) -> None:
    """Take a path as its text, which YAML and JSON have a form for."""
    for name in names:
        if isinstance(value := getattr(config, name), Path):
            object.__setattr__(config, name, str(value))


def expect(config: Any, name: str, ok: bool, expected: str, prefix: str = "") -> None:
    """Refuse a field's value that is not as expected.

    Raises:
        ConfigError: `ok` is false; the message calls the field `prefix` + `name`.
    """
    if not ok:
        raise ConfigError(f"{prefix}{name} must be {expected}, not {getattr(config, name)!r}")
