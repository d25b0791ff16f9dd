"""Every setting, as frozen dataclasses. Precedence: defaults < recipe < overrides.

A stage's section holds the settings that change its output and is part of its cache key; `runtime`
never is. Sections are plain fields without methods or derived values: the code that uses a setting
decides its meaning, and that code is in the stage's code digest.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml

from llm import presets
from llm.errors import ConfigError
from llm.settings import (
    Count,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Range,
    build,
    did_you_mean,
)

Section = TypeVar("Section")
CONFIG_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where raw data comes from. Which fields count depends on `kind`."""

    kind: Literal["stdlib", "files", "url", "hub"] = "stdlib"
    """stdlib: the running Python's standard library; files: local; url: http(s); hub: Hugging Face
    datasets.
    """
    path: str = ""
    """files: a file, a folder or a glob. Its bytes, not its place, enter the cache key."""
    url: str = ""
    """url: an http or https address."""
    sha256: str = ""
    """url: the sha256 the downloaded bytes must have, 64 hexadecimal characters. Required."""
    hub_name: str = ""
    """hub: the dataset, `owner/name`."""
    hub_config: str = ""
    """hub: its configuration; empty for the default one."""
    hub_split: str = "train"
    """hub: the split to read."""
    hub_revision: str = ""
    """hub: the commit, 40 hexadecimal characters, so that the bytes never change. A branch or a tag
    is looked up for every plan, and its commit is what counts and is recorded. Required.
    """
    is_hub_streamed: bool = False
    """hub: read records over the network, instead of fetching whole files first. Less disk, but
    nothing to go on from after a kill.
    """
    text_key: str = "text"
    """Corpus records (json, jsonl, hub): the key that holds the text."""
    max_documents: Count = 0
    """stdlib and hub: stop after this many documents; 0 takes all, and of the hub whole files."""


@dataclass(frozen=True, kw_only=True)  # no slots: MixedSourceConfig has those of another base
class ShareConfig:
    """How much of a mixture one of its sources is. The training documents alone are mixed."""

    weight: PositiveFloat = 1.0
    """Its part of the tokens, against the other weights. A source too small for it is read again.
    """
    max_tokens: Count = 0
    """Use no more of its documents than hold so many tokens; 0 uses all."""
    max_bytes: Count = 0
    """Use no more of its documents than hold so many bytes of text; 0 uses all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedSourceConfig(SourceConfig, ShareConfig):
    """One of several sources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig(SourceConfig):
    """One source, or several."""

    sources: tuple[MixedSourceConfig, ...] = ()
    """Several, instead of one: all other settings beside this are left alone then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """The two sources: text to learn the language from, chats to learn answering from."""

    corpus: MixtureConfig = field(default_factory=MixtureConfig)
    """Documents of plain text."""
    chats: MixtureConfig = field(default_factory=MixtureConfig)
    """Conversations: records with `messages`, or with `instruction`, `input` and `output`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GopherConfig:
    """The rules of Gopher, for English prose (Rae et al. 2021, arXiv:2112.11446, table A1).

    Words are what stands between blanks. A limit that cannot be passed, 0 or 1, turns its rule off.
    """

    min_words: Count = 50
    """Documents of fewer words are dropped."""
    max_words: Positive = 100_000
    """Documents of more words are dropped."""
    min_mean_word_characters: NonNegativeFloat = 3.0
    """Documents whose words are shorter on average are dropped."""
    max_mean_word_characters: PositiveFloat = 10.0
    """Documents whose words are longer on average are dropped."""
    max_hashes_per_word: NonNegativeFloat = 0.1
    """Number signs for each word."""
    max_ellipses_per_word: NonNegativeFloat = 0.1
    """Ellipses for each word."""
    max_bullet_lines_fraction: Fraction = 0.9
    """Share of lines that begin with a bullet point or a hyphen."""
    max_ellipsis_lines_fraction: Fraction = 0.3
    """Share of lines that end in an ellipsis."""
    min_alphabetic_words_fraction: Fraction = 0.8
    """Share of words that have a letter."""
    min_stop_words: Count = 2
    """Of the, be, to, of, and, that, have, with: how many must occur."""
    max_duplicate_lines_fraction: Fraction = 0.3
    """Share of lines that came before in the document."""
    max_duplicate_paragraphs_fraction: Fraction = 0.3
    """Share of paragraphs that came before."""
    max_duplicate_line_characters_fraction: Fraction = 0.2
    """Share of characters in lines that came before."""
    max_duplicate_paragraph_characters_fraction: Fraction = 0.2
    """Share of characters in paragraphs that came before."""
    max_top_2gram_fraction: Fraction = 0.2
    """Share of characters in the most frequent sequence of 2 words."""
    max_top_3gram_fraction: Fraction = 0.18
    """The same of 3 words."""
    max_top_4gram_fraction: Fraction = 0.16
    """The same of 4 words."""
    max_duplicate_5gram_fraction: Fraction = 0.15
    """Share of characters in sequences of 5 words that occur more than once."""
    max_duplicate_6gram_fraction: Fraction = 0.14
    """The same of 6 words."""
    max_duplicate_7gram_fraction: Fraction = 0.13
    """The same of 7 words."""
    max_duplicate_8gram_fraction: Fraction = 0.12
    """The same of 8 words."""
    max_duplicate_9gram_fraction: Fraction = 0.11
    """The same of 9 words."""
    max_duplicate_10gram_fraction: Fraction = 0.10
    """The same of 10 words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class C4Config:
    """The rules of C4, for English web pages (Raffel et al. 2020, arXiv:1910.10683, section 2.2).

    Lines that fail are removed; what is left of the page must pass too.
    """

    has_terminal_punctuation: bool = True
    """Remove lines that do not end in . ? ! or a quotation mark, or that end in an ellipsis."""
    min_words_per_line: Count = 5
    """Remove lines of fewer words."""
    max_word_characters: Positive = 1000
    """Remove lines with a longer word."""
    has_no_javascript: bool = True
    """Remove lines that mention it: they ask to have it turned on."""
    has_no_policy: bool = True
    """Remove lines on cookies, privacy and terms of use."""
    has_no_citations: bool = True
    """Remove marks like [1], [edit] and [citation needed]."""
    min_sentences: Count = 3
    """Drop pages of which fewer sentences are left."""
    has_no_lorem_ipsum: bool = True
    """Drop pages that hold it: they are not written yet."""
    has_no_curly_bracket: bool = True
    """Drop pages that hold one: they are code."""
    blocked_words: tuple[str, ...] = ()
    """Drop pages that hold one of these words; case is ignored. C4's own list is not included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicatesConfig:
    """Documents that are nearly those that are kept, found by MinHash (Lee et al. 2021,
    arXiv:2107.06499) and compared by the Jaccard index of their n-grams of words.
    """

    unit: Literal["none", "document", "paragraph"] = "none"
    """What is compared: nothing; whole texts and chats; the paragraphs of texts, which are cut out
    where a like one is kept elsewhere.
    """
    min_jaccard: Annotated[float, Range(minimum=0.5, maximum=1)] = 0.8
    """Share of n-grams that two have in common from which they count as nearly the same."""
    ngram_words: Positive = 5
    """Words in an n-gram; more makes every change count for more."""
    min_words: Positive = 20
    """What has fewer words is never compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminationConfig:
    """Training documents that hold what models are measured on (Brown et al. 2020,
    arXiv:2005.14165, appendix C).
    """

    action: Literal["none", "count", "drop"] = "none"
    """Leave training documents unread; count those that share an n-gram with validation documents,
    held-out chats (the corpus then depends on the chats), `evaluate.prompts` or `texts`; or drop
    them.
    """
    ngram_words: Positive = 13
    """Words in an n-gram that must not be shared."""
    max_documents: Annotated[int, Range(minimum=0, maximum=254)] = 10
    """An n-gram in more training documents than this is a common phrase and no sign; 0: all are."""
    texts: tuple[str, ...] = ()
    """More texts to keep out of training: prompts, questions of a test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingConfig:
    """What one raw file may unfold to: a bomb ends as an error, not as a full disk."""

    max_unpacked_bytes: Positive = 1 << 40
    """Most bytes that may come out of one compressed file or archive."""
    max_ratio: Annotated[float, Range(minimum=1)] = 200.0
    """Most bytes that may come out for each byte of the file; 64 MiB always may."""
    max_members: Positive = 100_000
    """Most members an archive may have. A zip file's list takes about 1 kB of memory for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """From raw files to documents with ids, each once, split into train and validation.

    The steps are taken in the order of these settings.
    """

    decode_errors: Literal["replace", "skip", "strict"] = "replace"
    """Bytes that are no UTF-8: replaced by U+FFFD and counted, the document skipped and counted, or
    an error.
    """
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    """Limits for compressed files and archives."""
    text_document_bytes: Positive = 32_768
    """Plain text files are cut at blank lines into documents of about this many bytes."""
    line_ends: Literal["as_is", "lf"] = "as_is"
    """lf: what ends a line, also a carriage return, becomes a line feed."""
    unicode_form: Literal["as_is", "nfc"] = "as_is"
    """nfc: characters are composed, so that each is written in one way. Not for code."""
    masks_emails: bool = False
    """Write [email] for every e-mail address."""
    masks_ip_addresses: bool = False
    """Write [ip] for every public IP address, version 4 or 6."""
    filters: Literal["none", "gopher", "c4", "gopher+c4"] = "none"
    """Rules that a text must pass, each counted by itself. Chats pass them by."""
    c4: C4Config = field(default_factory=C4Config)
    """Thresholds of C4's rules, which come first, for they change the text."""
    gopher: GopherConfig = field(default_factory=GopherConfig)
    """Thresholds of Gopher's rules."""
    min_document_bytes: Positive = 1
    """Shorter documents are dropped and counted."""
    near_duplicates: NearDuplicatesConfig = field(default_factory=NearDuplicatesConfig)
    """After documents of the same bytes, those nearly the same."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Training documents that give away what is measured."""
    split: Literal["hash", "tail"] = "hash"
    """hash: whole documents are chosen by their content; tail: the last characters of every text
    are, as is the custom where there is one long one. Chats are always split by hash.
    """
    validation_fraction: Annotated[float, Range(above=0, below=1)] = 0.05
    """Share of the documents, or of each one's characters, that no model is trained on."""
    shard_bytes: Positive = 128 << 20
    """Raw files are cleaned in shards of about this many bytes, each by a process, whose start
    takes as long as reading 30 MB; each leaves a file. Only plain `.jsonl` files are cut: one of
    another kind is read by one process.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTokenizerConfig:
    """How text becomes ids; what there is to learn is learned from the training documents."""

    kind: Literal["bpe", "gpt2", "sentencepiece", "characters", "bytes"] = "bpe"
    """bpe: byte-level byte-pair encoding; gpt2: the same as published, nothing is learned;
    sentencepiece: pieces, learned by the library of that name; characters: an id for each character
    of the training documents; bytes: an id for each of the 256.
    """
    vocab_size: Annotated[int, Range(minimum=264, maximum=1_000_000)] = 4096
    """bpe, sentencepiece: tokens in all: the control tokens, 256 bytes, and what is learned. More
    means fewer tokens per byte.
    """
    pre_tokenization: Literal["code", "gpt2", "gpt4"] = "code"
    """bpe: where text is split before merging. gpt4: a word may take the sign before it; code: it
    may not, and takes underscores; gpt2: blanks before a word are tokens of one character each.
    """
    max_digits: Annotated[int, Range(minimum=0, maximum=3)] = 3
    """bpe: digits in one token at most; 0 is no limit, as in GPT-2."""
    algorithm: Literal["unigram", "bpe"] = "unigram"
    """sentencepiece: unigram drops the pieces that explain least; bpe merges the commonest pair."""
    path: str = ""
    """gpt2: the folder with the published `encoder.json` and `vocab.bpe`; empty fetches them."""
    has_byte_fallback: bool = True
    """characters: a character that is not in the vocabulary is written by its bytes, for which
    there are 256 more ids. Without them such a text is refused, and such a document left out.
    """
    sample_bytes: Positive = 50_000_000
    """Learn from at most this much text, sampled by document; memory grows with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """From documents to rows of tokens."""

    seq_len: Annotated[int, Range(minimum=8, maximum=1_048_576)] = 256
    """T: positions in a row, the longest context the model ever sees."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """Of text. concatenate: one stream, cut every seq_len tokens; best_fit: no document that fits a
    row is cut, and rows that are not quite full end in padding. Chats are always packed so.
    """
    shard_bytes: Positive = 64 << 20
    """Documents that are packed together, by one process that holds all their tokens in memory.
    More means fewer, larger files, and less padding where there is any.
    """
    shares: tuple[ShareConfig, ...] = ()
    """Of several sources, as they stand in `download.<role>.sources`; not to be set here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of the transformer; its vocabulary is the tokenizer's, its context the rows'."""

    num_layers: Positive = 4
    """Transformer blocks, one after another."""
    d_model: Positive = 256
    """C: width of the residual stream."""
    num_heads: Positive = 4
    """H: query heads."""
    num_kv_heads: Positive = 4
    """K: key/value heads; num_heads must be a multiple. Fewer means a smaller cache; 1 is
    multi-query.
    """
    head_dim: Count = 0
    """D: width of a head, even under rope; 0 is d_model / num_heads."""
    d_ff: Positive = 704
    """F: width inside the feed-forward block, about 8/3 of d_model when gated, 4 when not."""
    positions: Literal["rope", "learned"] = "rope"
    """rope: queries and keys are rotated; learned: a vector for each position is added."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary wavelengths; raise it for longer contexts."""
    rope_scaling: Literal["none", "llama3"] = "none"
    """llama3: stretch the long wavelengths, so that a context beyond the trained one is read."""
    rope_factor: Annotated[float, Range(minimum=1)] = 8.0
    """llama3: how far the longest wavelengths are stretched."""
    rope_low_frequency_factor: PositiveFloat = 1.0
    """llama3: wavelengths over rope_original_seq_len / this are stretched whole."""
    rope_high_frequency_factor: PositiveFloat = 4.0
    """llama3: wavelengths under rope_original_seq_len / this are left alone."""
    rope_original_seq_len: Positive = 8192
    """llama3: the context before stretching."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """layernorm centers each vector too, and has a bias where `has_biases`."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square, or the variance, before its root is taken."""
    has_qk_norm: bool = False
    """RMSNorm on each head's query and key: attention scores cannot grow without bound."""
    mlp: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"
    """swiglu and geglu have a gate, a third matrix; gelu and relu2 (ReLU squared) have none."""
    has_biases: bool = False
    """A bias in every linear layer of the blocks, as in GPT-2."""
    tie_embeddings: bool = True
    """Use one matrix to embed tokens and to score them."""
    is_embedding_scaled: bool = False
    """Multiply embeddings by the root of d_model, as in Gemma."""
    attention_soft_cap: NonNegativeFloat = 0.0
    """Attention scores x become cap * tanh(x / cap), as in Gemma 2; 0 leaves them."""
    logit_soft_cap: NonNegativeFloat = 0.0
    """Logits x become cap * tanh(x / cap); 0 leaves them."""
    sliding_window: Count = 0
    """A position sees itself and this many less one before it; 0 sees all before it."""
    full_attention_every: Count = 0
    """With a window: every so many layers, the last of each group sees all; 0: every layer slides.
    """
    is_causal: bool = True
    """False: each position sees the whole row, and learning is by filling in masked tokens."""
    dropout: Annotated[float, Range(minimum=0, below=1)] = 0.0
    """Share of activations zeroed while training, after embedding, attention and feed-forward."""
    init: Literal["gpt2", "zero"] = "gpt2"
    """First weights. gpt2: all small, what adds to the stream smaller the deeper the model; zero:
    products keep the size of what they read, what adds to the stream and an untied head are zero.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationConfig:
    """What pretraining and fine-tuning both need: one loop, one set of settings."""

    num_steps: Positive = 500
    """Optimizer steps."""
    global_batch_size: Positive = 32
    """Rows in one optimizer step, over all processes and micro-batches."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices inside the blocks, AdamW for the rest."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of Muon."""
    muon_momentum: Annotated[float, Range(minimum=0, below=1)] = 0.95
    """Muon's memory of earlier gradients; less suits trainings of a few hundred steps."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """From the peak to the end; wsd stays at the peak and falls over the last `decay_fraction`."""
    warmup_steps: Count = 20
    """Steps over which the learning rate rises from zero."""
    decay_fraction: Annotated[float, Range(above=0, maximum=1)] = 0.3
    """wsd: share of the steps, at the end, over which the learning rate falls linearly."""
    final_learning_rate_fraction: Fraction = 0.1
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; vectors are not decayed."""
    beta1: Annotated[float, Range(minimum=0, below=1)] = 0.9
    """AdamW's first-moment decay."""
    beta2: Annotated[float, Range(minimum=0, below=1)] = 0.95
    """AdamW's second-moment decay."""
    max_gradient_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm when theirs is larger."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Of matrix products, where the processor has it; weights stay in fp32. fp16 scales the loss.
    """
    masked_fraction: Annotated[float, Range(above=0, below=1)] = 0.15
    """A model that is not causal: share of the tokens to be filled in."""
    document_mask: bool = False
    """Attend within a document only; off, a token also sees the documents before its own in the
    row.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(OptimizationConfig):
    """From rows of text to a base model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of what is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(OptimizationConfig):
    """From a base model and rows of chats to a chat model; only the answers are learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured, and the samples shown."""

    prompts: tuple[str, ...] = ("The ", "def ", "import ")
    """Continued by the base model and the chat model, side by side."""
    max_new_tokens: Positive = 64
    """Longest answer or continuation."""
    temperature: NonNegativeFloat = 0.8
    """Of the samples; 0 takes the likeliest token. Answers to instructions are always greedy."""
    top_k: Count = 0
    """Samples are drawn from so many likeliest tokens; 0 draws from all."""
    top_p: Annotated[float, Range(above=0, maximum=1)] = 1.0
    """Samples are drawn from the fewest likeliest tokens with this probability together."""
    min_p: Fraction = 0.0
    """Samples are drawn from tokens at least this share as likely as the likeliest."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1, tokens already in a sample or its prompt become less likely."""
    num_instructions: Positive = 200
    """Held-out instructions answered for the exact-match figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how. Never part of a cache key."""

    artifacts_dir: str = "artifacts"
    """Folder of all artifacts, locks and logs."""
    cache_dir: str = ""
    """Folder for files fetched from stores (`fromscratch spread`); empty: artifacts_dir/cache."""
    cache_bytes: Count = 0
    """Of all files there; those unused for longest go first. 0 sets no limit. Training needs room
    for all the rows it reads, since they come in one shuffled order.
    """
    project: str = "fromscratch"
    """First part of the MLflow experiments' names."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: every visible GPU, else the CPU."""
    num_processes: Count = 0
    """Training processes; 0 is one per visible GPU, or one on a machine without any. Where they do
    not divide global_batch_size, some learn from a row less in each step.
    """
    micro_batch_size: Count = 0
    """At most so many rows in one forward pass of one process; 0: as many as there is memory for.
    Where that does not divide a process's rows, its passes are of a smaller, equal size.
    """
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile: auto compiles on a GPU, where minutes of training win back its start-up."""
    deterministic: Literal["auto", "always", "never"] = "auto"
    """Use only kernels that add in a fixed order, so that the same training, resumed or not, gives
    the same bits on the same kind of device. auto: on a CPU, where it costs nothing, not on a GPU.
    """
    activation_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again: less memory, a third slower."""
    num_threads: Count = 0
    """CPU threads of one process; 0 divides the cores among the processes."""
    shard_runner: Literal["processes", "dask", "ray"] = "processes"
    """Where the shards of clean and pack are done: in processes here, or on a cluster."""
    shard_workers: Count = 0
    """Shards done at the same time; 0 is one for each core, or what the cluster has."""
    cluster_address: str = ""
    """Of the Dask scheduler or the Ray head; empty starts a cluster on this machine."""
    checkpoint_every_steps: Positive = 50
    """Steps between checkpoints: at most this much work is lost to a kill."""
    keep_checkpoints: Annotated[int, Range(minimum=2)] = 2
    """Newest checkpoints kept while a stage runs; at least two, so a damaged one has a predecessor.
    """
    validate_every_steps: Positive = 50
    """Steps between measurements of validation loss."""
    validation_sequences: Positive = 64
    """Validation rows measured while training; the report measures all."""
    log_every_steps: Positive = 1
    """Steps between points of the training curves."""
    max_restarts: Count = 1
    """Times a stage whose process was killed by a signal is started again from its checkpoint."""
    stall_seconds: Positive = 900
    """A training that reports nothing for so long is taken for hung, stopped and restarted."""
    tracking_uri: str = ""
    """MLflow: empty takes MLFLOW_TRACKING_URI, or else a SQLite file in artifacts_dir."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole recipe, resolved: one section per stage, and `runtime`."""

    name: str
    """The recipe's name."""
    description: str = ""
    """One line for people."""
    seed: Count = 1
    """Every random choice derives from it and its purpose."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """Raw data."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """Documents."""
    train_tokenizer: TrainTokenizerConfig = field(default_factory=TrainTokenizerConfig)
    """Tokenizer."""
    pack: PackConfig = field(default_factory=PackConfig)
    """Rows."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Base model."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Chat model."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Report."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Where and how."""


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a recipe (a name in configs/, or a YAML file) and `section.key=value` overrides.

    Raises:
        ConfigError: lists every problem with its dotted key and the allowed values.
    """
    path = find_recipe(recipe)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of 5,000 digits
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected `section: {{key: value}}`, found {type(tree).__name__}"
        )
    problems: list[str] = []
    tree.setdefault("name", path.stem)
    presets.make_room(tree, overrides)
    for override in overrides:
        _apply_override(tree, override, problems)
    depth = presets.take_depth(tree, problems)
    presets.expand_preset(tree, problems)
    config = build(RunConfig, tree, "", problems)
    if config is not None and depth:
        presets.expand_depth(tree, depth, _depth_context(typing.cast(RunConfig, config)))
        config = build(RunConfig, tree, "", problems)
    if config is not None:
        problems += _cross_checks(typing.cast(RunConfig, config))
    if problems or config is None:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{path.name}: {len(problems)} problem(s) in the settings\n{listed}")
    return typing.cast(RunConfig, config)


def read_section(cls: type[Section], settings: Mapping[str, object]) -> Section:
    """Build one section, such as `PackConfig`, from the mapping in a job file or a manifest.

    Raises:
        ConfigError: the mapping was written by another version.
    """
    problems: list[str] = []
    if not isinstance(typing.cast(object, settings), Mapping):
        raise ConfigError(f"{cls.__name__}: found {settings!r}, expected settings by name")
    section = build(cls, settings, "", problems)
    if section is None:
        raise ConfigError(f"{cls.__name__}: " + "; ".join(problems))
    return typing.cast(Section, section)


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe given by name or by path.

    Raises:
        ConfigError: there is no such recipe.
    """
    text = str(recipe)
    if text.endswith((".yaml", ".yml")) or os.sep in text:
        if Path(text).is_file():
            return Path(text)
        raise ConfigError(f"{text}: no such recipe file")
    for folder in CONFIG_FOLDERS:
        if (folder / f"{text}.yaml").is_file():
            return folder / f"{text}.yaml"
    names = recipe_names()
    raise ConfigError(
        f"{text}: unknown recipe{did_you_mean(text, names)}; known: {', '.join(names)}"
    )


def recipe_names() -> list[str]:
    """Return the names of the recipes in configs/, sorted."""
    return sorted({path.stem for folder in CONFIG_FOLDERS for path in folder.glob("*.yaml")})


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """Return every leaf of a config or nested mappings by dotted key, `pretrain.model.d_model`."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    if isinstance(tree, list | tuple) and not all(isinstance(item, str) for item in tree):
        tree = {str(index): item for index, item in enumerate(typing.cast(Sequence[object], tree))}
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    leaves: dict[str, object] = {}
    for key, value in typing.cast(Mapping[str, object], tree).items():
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return leaves


def load_preset(name: str) -> tuple[ModelConfig, int, int]:
    """Return a published model's shape, vocabulary size and context length.

    Raises:
        ConfigError: there is no such preset.
    """
    tree: dict[str, object] = {"pretrain": {"model": {"preset": name}}}
    problems: list[str] = []
    presets.expand_preset(tree, problems)
    if problems:
        raise ConfigError("; ".join(problems))
    preset = presets.PRESETS[name]
    return read_section(ModelConfig, preset.model), preset.vocab_size, preset.seq_len


def model_problems(model: ModelConfig, prefix: str) -> list[str]:
    """Return the inconsistencies between the settings of a model, each with its dotted key."""
    problems: list[str] = []
    if not model.head_dim and model.d_model % model.num_heads:
        problems.append(
            f"{prefix}.d_model: found {model.d_model}, expected a multiple of {prefix}.num_heads ="
            f" {model.num_heads}, or {prefix}.head_dim to be given"
        )
    head_dim = model.head_dim or model.d_model // model.num_heads
    if model.positions == "rope" and head_dim % 2:
        source = "head_dim" if model.head_dim else "d_model"
        problems.append(
            f"{prefix}.{source}: found {getattr(model, source)}, which makes heads"
            f" {head_dim} wide, expected an even width under {prefix}.positions = rope"
        )
    if model.num_heads % model.num_kv_heads:
        problems.append(
            f"{prefix}.num_kv_heads: found {model.num_kv_heads}, expected a divisor of"
            f" {prefix}.num_heads = {model.num_heads}"
        )
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    if model.rope_scaling == "llama3" and low >= high:
        problems.append(
            f"{prefix}.rope_low_frequency_factor: found {low}, expected less than"
            f" {prefix}.rope_high_frequency_factor = {high}"
        )
    if model.rope_scaling != "none" and model.positions != "rope":
        problems.append(
            f"{prefix}.rope_scaling: found {model.rope_scaling}, expected none where"
            f" {prefix}.positions is {model.positions}"
        )
    if model.full_attention_every and not model.sliding_window:
        problems.append(
            f"{prefix}.full_attention_every: found {model.full_attention_every}, expected 0 where"
            f" {prefix}.sliding_window is 0 and every layer has full attention"
        )
    return problems


def _apply_override(tree: dict[str, object], override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        problems.append(f"{override}: expected section.key=value")
        return
    try:
        value: object = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError:
        value = text
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if isinstance(child, list):  # `sources.0.weight` overrides one item
            child = {str(index): item for index, item in enumerate(child)}
            node[parent] = child
        if not isinstance(child, dict):
            problems.append(f"{key}: {parent} is a value, not a section")
            return
        node = typing.cast(dict[str, object], child)
    node[last] = value


def _depth_context(config: RunConfig) -> presets.Surroundings:
    """Return the settings that the expansion of `pretrain.depth` depends on."""
    model, tokenizer = config.pretrain.model, config.train_tokenizer
    has_few_tokens = tokenizer.kind in ("bytes", "characters")  # hundreds: negligible parameters
    return presets.Surroundings(
        is_gated=model.mlp in ("swiglu", "geglu"),
        tie_embeddings=model.tie_embeddings,
        vocab_size=256 if has_few_tokens else tokenizer.vocab_size,
        tokens_per_step=config.pretrain.global_batch_size * config.pack.seq_len,
    )


def _cross_checks(config: RunConfig) -> list[str]:
    """Return the problems between settings of different keys."""
    problems = model_problems(config.pretrain.model, "pretrain.model")
    for stage in ("pretrain", "finetune"):
        section: OptimizationConfig = getattr(config, stage)
        if section.warmup_steps >= section.num_steps:
            problems.append(
                f"{stage}.warmup_steps: found {section.warmup_steps}, expected less than"
                f" {stage}.num_steps = {section.num_steps}"
            )
    for slot in ("corpus", "chats"):
        mixture: MixtureConfig = getattr(config.download, slot)
        problems += _mixture_problems(mixture, f"download.{slot}")
    if config.pack.shares:
        problems.append("pack.shares: set; expected weights in download.<role>.sources instead")
    return problems


def _mixture_problems(mixture: MixtureConfig, dotted: str) -> list[str]:
    if not mixture.sources:
        return _source_problems(mixture, dotted)
    problems = [
        f"{dotted}.{known.name}: has no effect next to {dotted}.sources; move it into a source"
        for known in dataclasses.fields(SourceConfig)
        if getattr(mixture, known.name) != known.default
    ]
    for index, source in enumerate(mixture.sources):
        problems += _source_problems(source, f"{dotted}.sources.{index}")
    return problems


def _source_problems(source: SourceConfig, dotted: str) -> list[str]:
    def is_hexadecimal(text: str, length: int) -> bool:
        return len(text) == length and all(character in "0123456789abcdef" for character in text)

    problems: list[str] = []
    if source.kind == "files" and not source.path:
        problems.append(
            f"{dotted}.path: empty, expected a file, folder or glob since {dotted}.kind is files"
        )
    if source.kind == "url":
        if not source.url.startswith(("http://", "https://")):
            problems.append(
                f"{dotted}.url: found {source.url!r}, expected an http:// or https:// address"
            )
        if not is_hexadecimal(source.sha256, 64):
            problems.append(
                f"{dotted}.sha256: found {source.sha256!r}, expected a sha256 of 64 hex characters"
            )
    if source.kind == "hub":
        if not source.hub_name:
            problems.append(
                f"{dotted}.hub_name: empty, expected owner/name since {dotted}.kind is hub"
            )
        if not source.hub_revision:
            problems.append(
                f"{dotted}.hub_revision: found '', expected a commit of 40 hex characters, or a"
                " branch or tag to look it up"
            )
    return problems
