"""The typed recipe: every field a run knows, with its default and one line of meaning.

One pydantic class per section. Nothing here reads files or runs anything: `recipe.load` turns YAML into
a `Recipe` and words its errors, `pipeline` executes it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PRETRAINING = ("causal_lm", "masked_lm", "denoise")
"""The tasks that learn from running text."""

UNITS = {
    "classify_image": "images",
    "caption": "images",
    "generate_image": "pixels",
    "detect": "images",
    "match_image_text": "images",
    "next_item": "items",
    "forecast": "points",
    "classify_row": "cells",
}
"""What is counted of the batches of tasks that do not read tokens."""


def unit_of(task: str) -> str:
    """What a task's speed is counted in: tokens, images, ..."""
    return UNITS.get(task, "tokens")


class Section(BaseModel):
    """A recipe section: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Clean(Section):
    """What happens to a document before it is split; every step counts what it changed or dropped."""

    repair: bool = Field(True, description="mend mis-decoded text (ftfy) where it looks broken")
    unicode: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode normal form")
    control_characters: bool = Field(True, description="remove control characters except tab and newline")
    min_chars: int = Field(1, ge=0, description="drop documents shorter than this")
    max_chars: int | None = Field(None, ge=1, description="drop documents longer than this")
    max_repetition: float | None = Field(
        None, gt=0, le=1, description="drop documents in which duplicate lines or 10-character runs exceed this share"
    )
    duplicates: bool = Field(True, description="drop exact duplicates (after case and space folding)")
    near_duplicates: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="drop documents whose estimated Jaccard similarity (MinHash) to a kept one exceeds this",
    )
    languages: list[str] | None = Field(None, description="keep only these languages (ISO 639-1: en, zh, fr, ...)")
    pii: Literal["keep", "mask", "drop"] = Field(
        "keep", description="personal data: keep, replace by <EMAIL> and the like, or drop the document"
    )
    stop_words: str | None = Field(None, description="remove stop words of this language (for classic baselines)")
    stem: str | None = Field(
        None, description="stem words with snowballstemmer's algorithm of this name (for classic baselines)"
    )
    segment: Literal["jieba", "none"] = Field(
        "none", description="put spaces between Chinese words (for classic baselines)"
    )


class Split(Section):
    """How rows are divided; by hash they stay where they are when data is added."""

    by: Literal["hash", "order"] = Field("hash", description="hash of the row (or group), or the file's own order")
    validation: float = Field(
        0.05, ge=0, lt=1, description="share of the rows; of events (next_item), above 0: each user's last but one item"
    )
    test: float = Field(
        0.05, ge=0, lt=1, description="share of the rows; of events (next_item), above 0: each user's last item"
    )
    cold: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="next_item: share of the items that no training row has, for test, and as many for validation; only they are held out then",
    )
    group: str | None = Field(None, description="column whose equal values stay together")
    salt: str = Field("formary", description="another salt gives another split")
    folds: int | None = Field(
        None, ge=2, description="divide the rows that are not test into this many folds, instead of by shares"
    )
    fold: int | None = Field(None, ge=1, description="which fold is validation, from 1; the others are training")
    duplicates: Literal["remove", "keep"] = Field(
        "remove", description="training rows that also occur in validation or test"
    )


class Tokenizer(Section):
    """A tokenizer to train, or one to load."""

    kind: Literal["bpe", "wordpiece", "unigram", "characters", "bytes"] = Field("bpe", description="what to train")
    vocab_size: int = Field(
        4096,
        ge=8,
        description="size of the vocabulary, special tokens included; characters and bytes take what they need",
    )
    path: str | None = Field(
        None,
        description="load instead: a tokenizer.json, a vocab.txt, a vocab.json beside merges.txt, or a model folder",
    )
    lowercase: bool = Field(False, description="fold case (WordPiece as in BERT uncased)")
    sample_chars: int = Field(50_000_000, ge=1000, description="train on at most this many characters")


class Augment(Section):
    """Random changes to training rows only; each is a probability."""

    delete: float = Field(0.0, ge=0, lt=1, description="drop a word")
    swap: float = Field(0.0, ge=0, lt=1, description="swap neighbouring words")
    synonym: float = Field(0.0, ge=0, lt=1, description="replace a word from the synonyms table")
    synonyms: str | None = Field(None, description="table: one group of synonyms a line, separated by tabs or commas")
    mask: float = Field(0.0, ge=0, lt=1, description="replace a span of words by one mask word")
    back_translate: str | None = Field(None, description="a Python function module:function, text -> text")
    copies: int = Field(1, ge=1, description="augmented copies per row, beside the original")


class Items(Section):
    """What is known of the things that rows name: a table with a text for each item."""

    sources: list[str] = Field(description="files, folders or globs, as data.sources")
    columns: dict[str, str] = Field(
        default_factory=dict, description="our name (item, text): your column, or a text of several, as data.columns"
    )
    vectors: str = Field(
        description="the model that turns texts into vectors: a model folder, a hub id, package:NAME/path, or the model of recipe:NAME"
    )


class Data(Section):
    """Where the rows come from and how they become tokens."""

    sources: list[str] = Field(
        description="files, folders or globs: txt, jsonl, csv, parquet, each also .gz or .zst; npz, idx; png, jpg; "
        "'this | that': the first that is there"
    )
    validation: list[str] = Field(default_factory=list, description="rows for validation, instead of a split")
    test: list[str] = Field(default_factory=list, description="rows for test, instead of a split")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our name: your column, e.g. {text: body}, or a text of several, e.g. {text: 'Age {Age}, job {Job}'}; "
        "@file and @folder: what the file or its folder is called",
    )
    names: list[str] = Field(
        default_factory=list, description="what labels are called that are numbers: the names of 0, 1, 2, ..."
    )
    documents: str = Field(
        "file",
        description="how a plain text file becomes documents: file, line, paragraph, or a regular expression that begins one",
    )
    encoding: str = Field("utf-8", description="of text files")
    max_rows: int | None = Field(None, ge=1, description="read at most this many rows")
    items: Items | None = Field(None, description="next_item: texts of items, so that new ones can be recommended")
    clean: Clean = Clean()
    split: Split = Split()
    tokenizer: Tokenizer = Tokenizer()
    augment: Augment = Augment()
    words: Literal["tokenizer", "jieba", "none"] = Field(
        "none", description="mark where words begin, for whole-word masking (jieba: Chinese words)"
    )


class Model(Section):
    """Which Transformer: a preset, a size, and any switch of TransformerConfig; or weights to start from."""

    preset: str = Field(
        "gpt-mini", description="see `formary recipes --presets`; fast brings its optimiser and schedule along"
    )
    size: str | None = Field(None, pattern=r"^\d+x\d+$", description="layers x width, e.g. 6x384")
    start: str | None = Field(
        None,
        description="weights to start from: a model folder, a hub id, package:NAME/path, or recipe:NAME, which is run first",
    )
    start_text: str | None = Field(
        None,
        description="caption, match_image_text: a second model to start from, which writes or reads the texts; start is a ViT then",
    )
    switches: dict[str, Any] = Field(
        default_factory=dict, description="fields of TransformerConfig that replace the preset's"
    )

    @property
    def words(self) -> str | None:
        """The model whose tokenizer is the run's, if any is started from."""
        return self.start_text or self.start

    @property
    def named(self) -> str:
        """What the model is made of, for the eye."""
        return " with ".join(filter(None, (self.start, self.start_text))) or self.preset


class Optimiser(Section):
    """The update rule."""

    name: Literal["adamw", "adam", "sgd", "muon"] = Field(
        "adamw", description="muon: hidden matrices by Muon, the rest by AdamW"
    )
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1e-3,
        description="peak learning rate (of AdamW's part under muon); auto: found by a range test before training",
    )
    matrix_lr: float = Field(
        0.02,
        gt=0,
        description="Muon's learning rate for hidden matrices; with lr: auto, its value beside an lr of 0.001",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="Adam's moment decay rates")
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon and SGD")
    weight_decay: float = Field(0.1, ge=0, description="decoupled L2, on matrices only")
    l1: float = Field(0.0, ge=0, description="L1 penalty on matrices")

    @property
    def peak_lr(self) -> float:
        """`lr` as a number; `train.settled` makes it one before training."""
        assert self.lr != "auto", "train.optimiser.lr is not settled"
        return self.lr


class Schedule(Section):
    """How the learning rate moves over the run."""

    name: Literal["constant", "linear", "cosine", "exponential", "wsd"] = Field(
        "cosine", description="wsd: warm-up, stable, decay"
    )
    warmup: float = Field(0.02, ge=0, description="steps (>= 1) or share of the run (< 1)")
    decay: float = Field(0.3, gt=0, le=1, description="share of the run that wsd decays over")
    final: float = Field(0.1, ge=0, le=1, description="last rate as a share of the peak")


class Ramp(Section):
    """Short sequences first: they cost less, and what is near is learned first."""

    first: int = Field(ge=2, description="tokens per sequence at the beginning; they double until train.context")
    share: float = Field(0.3, gt=0, lt=1, description="share of the run after which all sequences have train.context")


class Objective(Section):
    """Settings of what is learned; each task reads its own."""

    cross_documents: bool = Field(True, description="causal: let packed documents attend to one another")
    mask_rate: float = Field(0.15, gt=0, lt=1, description="masked: share of tokens to predict (BERT 15 %)")
    whole_words: bool = Field(False, description="masked: mask whole words (data.words must not be none)")
    next_sentence: bool = Field(False, description="masked: BERT's next-sentence prediction beside it")
    noise_density: float = Field(0.15, gt=0, lt=1, description="denoise: share of tokens in removed spans (T5)")
    mean_span: float = Field(3.0, ge=1, description="denoise: mean length of a removed span (T5)")
    kind: Literal["auto", "single", "multi", "regression"] = Field(
        "auto", description="classify: one label, several, or a number; auto: what the labels look like"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="classify: let rare classes weigh as much as common ones"
    )
    stride: int = Field(64, ge=1, description="answer_span: tokens that neighbouring windows of a context share")
    longest_answer: int = Field(30, ge=1, description="answer_span: tokens an answer may have")
    longest_target: int = Field(128, ge=2, description="translate: tokens a target may have")
    transitions: Literal["repair", "crf", "none"] = Field(
        "repair", description="tag: how illegal sequences of tags are avoided"
    )
    beta: float = Field(0.1, gt=0, description="preference: strength of the pull to the model it starts from (DPO)")
    temperature: float = Field(0.05, gt=0, description="embed: of the contrastive softmax")
    item_loss: Literal["softmax", "sampled_softmax", "bce", "bpr"] = Field(
        "softmax",
        description="next_item: against all items (softmax), or against drawn ones: one softmax (sampled_softmax), each by itself (bce, as SASRec), by pairs (bpr)",
    )
    negatives: int = Field(
        1, ge=1, description="next_item: items drawn against each right one; sampled_softmax: against all of a batch"
    )
    exclude_seen: bool = Field(True, description="next_item: never recommend what the user had before")
    described_alone: float = Field(
        0.3,
        ge=0,
        le=1,
        description="next_item with data.items: share of the items whose learned vector is left out in a step (DropoutNet); 1: vectors from texts stand in place of learned ones",
    )
    values: list[str] | None = Field(
        None,
        description="forecast: the columns to forecast; null: value where there is such a column, else all numbers",
    )
    known: list[str] = Field(
        default_factory=list,
        description="forecast: columns that are known for the future too, such as holidays or prices",
    )
    horizon: int = Field(24, ge=1, description="forecast: how many steps ahead")
    season: int | None = Field(
        None,
        ge=1,
        description="forecast: steps after which the series is most alike; null: a day, week or year by its step",
    )
    anchor: Literal["level", "season"] = Field(
        "level",
        description="forecast: what is learned is the difference from the history's level, or from the season before",
    )
    quantiles: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=lambda: [0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975],
        description="forecast: learned by the pinball loss; [] for point forecasts alone",
    )
    point: Literal["median", "mse", "mae"] = Field(
        "median", description="forecast: the point forecast is the median, or learned by squared or absolute error"
    )
    origins_every: int | None = Field(
        None, ge=1, description="forecast: steps between the forecasts of a backtest; null: the horizon"
    )
    side: int = Field(
        28, ge=4, description="generate_image: pictures are read and written as squares of so many pixels"
    )
    colours: int = Field(
        16, ge=2, le=512, description="generate_image: that pixels are rounded to, chosen from the training pictures"
    )
    columns: list[str] | None = Field(
        None, description="classify_row: the columns to tell the label from; null: all that can tell anything"
    )
    nothing: float = Field(
        0.1,
        gt=0,
        le=1,
        description="detect: what a detection token that should find nothing weighs, beside one that should",
    )
    box_l1: float = Field(5.0, ge=0, description="detect: weight of the distance between a box and the right one")
    box_giou: float = Field(2.0, ge=0, description="detect: weight of how little they overlap (generalised IoU)")
    patches: float = Field(
        0.3,
        ge=0,
        description="detect: weight of what patches say while they learn: each the thing that it lies in, or nothing",
    )
    normalise: Literal["none", "length", "bytes"] = Field(
        "none",
        description="multiple_choice, causal models: divide a choice's log-likelihood by its tokens or its bytes",
    )


class Tune(Section):
    """Which weights of a loaded model train, and how fast."""

    method: Literal["full", "head", "last", "lora"] = Field(
        "full", description="all weights, the new head only, the last blocks, or low-rank updates (LoRA)"
    )
    layers: int = Field(2, ge=1, description="last: how many blocks train")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="each block below learns at this share of the rate of the one above"
    )
    rank: int = Field(8, ge=1, description="lora: rank of the updates")
    alpha: float = Field(16.0, gt=0, description="lora: updates are scaled by alpha / rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="lora: dropout before the updates")
    targets: Literal["attention", "all"] = Field("all", description="lora: which matrices; all: the ffn's too")


class Stability(Section):
    """What is done about steps that would do harm."""

    spikes: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="skip a step whose loss or gradient norm is so many standard deviations above its running mean; "
        "auto: 6 on running text and none on rows, whose hard examples look like spikes; null: none",
    )
    roll_back_after: int = Field(
        10, ge=1, description="skipped steps in a row after which training goes back to the last good checkpoint"
    )
    roll_back_lr: float = Field(0.5, gt=0, lt=1, description="the learning rate is multiplied by this each time")
    roll_backs: int = Field(3, ge=0, description="how often that is done before the run ends")


class AugmentImages(Section):
    """Random changes to pictures while they are learned, other ones at every step."""

    crop: int = Field(0, ge=0, description="move the picture by up to so many pixels, over a black border")
    flip: bool = Field(False, description="half of the pictures are seen in a mirror")
    operations: int = Field(
        0, ge=0, description="of RandAugment on each: turned, sheared, shifted, brighter, darker, fewer colours, ..."
    )
    strength: float = Field(0.3, ge=0, le=1, description="how far these go, as a share of the furthest")
    erase: float = Field(0.0, ge=0, lt=1, description="share of the pictures in which a rectangle becomes noise")
    mixup: float = Field(
        0.0, ge=0, description="pictures and their labels are mixed, by shares from Beta(mixup, mixup)"
    )

    mosaic: float = Field(
        0.0, ge=0, le=1, description="detect: share of the pictures that become four parts of four pictures"
    )

    @property
    def asked(self) -> list[str]:
        """The kinds of change that are asked for."""
        kinds = ("crop", "flip", "operations", "erase", "mixup", "mosaic")
        return [kind for kind in kinds if getattr(self, kind)]


class Train(Section):
    """The training loop."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; one of steps, epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training tokens")
    batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        16, description="sequences per optimiser step; auto: what fits into memory and suits the number of rows"
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="sequences per forward pass of a process; smaller than its part of the batch means gradient accumulation",
    )
    activation_checkpointing: bool = Field(
        False, description="keep only what enters a block and compute the rest again: less memory, a third more time"
    )
    context: int = Field(256, ge=2, description="tokens per sequence")
    ramp: Ramp | None = Field(None, description="causal_lm: short sequences first, with as many tokens a step")
    objective: Objective = Objective()
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    tune: Tune = Tune()
    augment: AugmentImages = AugmentImages()
    clip: float | None = Field(1.0, gt=0, description="gradient norm is clipped to this")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each target that is spread over all choices; not for embed, a regression or tags with a CRF",
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="keep an exponential average of the weights with this decay"
    )
    validate_every: int = Field(200, ge=1, description="steps between validations")
    validation_tokens: int | None = Field(100_000, ge=1, description="validate on at most this many tokens; null: all")
    patience: int | None = Field(None, ge=1, description="stop after this many validations without improvement")
    best: Literal["loss", "metric"] = Field(
        "loss", description="what chooses the best weights: the validation loss or the task's first metric"
    )
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best")
    keep_best: int = Field(1, ge=1, description="checkpoints kept of the best validations")
    keep_hours: float | None = Field(
        None, gt=0, description="keep for good a checkpoint each time so many hours of training have gone by"
    )
    stability: Stability = Stability()
    sample_every: int | None = Field(None, ge=1, description="steps between text samples")
    histograms_every: int | None = Field(
        None, ge=1, description="steps between histograms of weights and gradients in TensorBoard; null: none"
    )
    seed: int = Field(1337, ge=0)

    @property
    def batch_size(self) -> int:
        """`batch` as a number; `train.settled` makes it one before batches are made."""
        assert self.batch != "auto", "train.batch is not settled"
        return self.batch


class Evaluate(Section):
    """What is measured at the end, on the test split."""

    baselines: bool = Field(True, description="unigram and interpolated 5-gram on the same split")
    ngram_order: int = Field(5, ge=1, le=8)
    bootstrap: int = Field(1000, ge=100, description="resamples behind each 95 % interval")
    max_tokens: int | None = Field(None, ge=1, description="evaluate at most this many test tokens; null: all")
    sampled: int | None = Field(
        None,
        ge=1,
        description="next_item: also as if each right item were ranked among so many others drawn at random, not all",
    )
    near_duplicates: float = Field(
        0.8, gt=0, lt=1, description="test rows this similar to a training row are counted, and scored without"
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="tokens scored per window; default half the context, so each is seen with at least the other half before it",
    )


class Generate(Section):
    """How the model writes, for the samples and as the model's own defaults."""

    prompts: list[str] = Field(default_factory=list, description="what the samples in the report start from")
    max_tokens: int = Field(120, ge=1)
    temperature: float = Field(0.8, ge=0, description="0 is greedy")
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(0.95, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0)


class Search(Section):
    """What `formary search` tries."""

    space: dict[str, Any] = Field(
        default_factory=dict,
        description="field: a list of values, {range: [low, high]} or {log: [low, high]}; default: train.optimiser.lr, train.batch and train.epochs around the recipe's",
    )
    trials: int = Field(20, ge=1, description="how many trainings, those of earlier calls included")
    minutes: float | None = Field(None, gt=0, description="begin no trial after this many minutes")
    sampler: Literal["tpe", "random"] = Field(
        "tpe", description="what is tried next: near what was good (tree-structured Parzen estimator), or anywhere"
    )
    prune: bool = Field(True, description="stop a trial that validates worse than the median of the earlier ones")
    metric: Literal["loss", "metric"] | None = Field(
        None, description="what validation has to improve; null: what train.best says"
    )


class Privacy(Section):
    """Differentially private training: what a stranger can learn of one training row from the weights is bounded."""

    epsilon: float = Field(8.0, gt=0, description="the privacy that the whole training may spend; less is more private")
    delta: float = Field(
        1e-5, gt=0, lt=1, description="the chance that the bound does not hold; well under 1 / training rows"
    )
    clip: float = Field(1.0, gt=0, description="the gradient norm that each row is clipped to, in place of train.clip")
    accountant: Literal["prv", "rdp"] = Field(
        "prv", description="how Opacus counts epsilon: privacy random variables (tighter) or Renyi divergence"
    )
    seed: int | None = Field(
        None,
        ge=0,
        description="of noise and sampling; null: from the operating system. A number repeats a run, and who knows it can undo the noise",
    )


class Machine(Section):
    """What the run may use."""

    threads: int | None = Field(
        None, ge=1, description="of each process; null: the physical cores, shared by the processes on the machine"
    )
    parallel: Literal["auto", "ddp", "fsdp", "none"] = Field(
        "auto",
        description="several processes: ddp, a whole model in each; fsdp, a part of it in each; auto: fsdp where half the memory is too small for weights, gradients and moments",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast where the hardware has it and float32 elsewhere"
    )
    profile: bool = Field(
        False, description="watch some steps: a Chrome trace, and where the time goes (formary run --profile)"
    )
    trackers: list[Literal["mlflow", "wandb"]] = Field(
        default_factory=list, description="tell MLflow or Weights & Biases of the training too (extras of these names)"
    )
    compile: bool = Field(False, description="torch.compile: pays on long runs, needs a C++ compiler")
    deterministic: bool = Field(
        False, description="only algorithms that give the same bits every time, slower on GPUs; CPUs do so anyway"
    )


class Recipe(Section):
    """One run, from raw data to a measured model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run folder")
    description: str = ""
    task: str = Field("causal_lm", description="causal_lm, masked_lm or denoise")
    data: Data
    model: Model = Model()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    generate: Generate = Generate()
    search: Search = Search()
    privacy: Privacy | None = Field(None, description="train with differential privacy (extra privacy: Opacus)")
    machine: Machine = Machine()
    run_folder: str | None = Field(None, description="default: runs/NAME")

    @property
    def pretrains(self) -> bool:
        """Whether it learns from running text; other tasks learn from rows with answers."""
        return self.task in PRETRAINING

    @property
    def spikes(self) -> float | None:
        """`train.stability.spikes` as a number; None: spikes are not looked for."""
        asked = self.train.stability.spikes
        return (6.0 if self.pretrains else None) if asked == "auto" else asked
