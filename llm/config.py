"""Every setting, as frozen dataclasses. Precedence: defaults < recipe < overrides.

A stage's section holds the settings that change its output and is part of its cache key; `runtime`
never is. Sections are plain fields without methods or derived values: the code that uses a setting
decides its meaning, and that code is in the stage's code digest.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from llm.data.chat import CHAT_FORMATS
from llm.data.raw.record_formats import FORMAT_NAMES
from llm.errors import ConfigError
from llm.settings import (
    Count,
    Fraction,
    NonNegativeFloat,
    OneOf,
    Positive,
    PositiveFloat,
    Range,
    build,
)
from llm.tokenizer.kinds import TOKENIZER_KINDS

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """A source of raw data. Which fields apply depends on `kind`."""

    kind: Literal["stdlib", "files", "url", "hub"] = "stdlib"
    """stdlib: the running Python's standard library; files: local; url: http(s); hub: Hugging Face
    datasets.
    """
    path: str = ""
    """files: a file, a folder or a glob. The bytes, not the path, are part of the cache key."""
    url: str = ""
    """url: an http or https URL."""
    sha256: str = ""
    """url: the expected sha256, 64 hexadecimal characters. Required."""
    hub_name: str = ""
    """hub: the dataset, `owner/name`."""
    hub_config: str = ""
    """hub: its configuration; empty for the default one."""
    hub_split: str = "train"
    """hub: the split to read."""
    hub_revision: str = ""
    """hub: the commit, 40 hexadecimal characters. A branch or tag is resolved for every plan, and
    its commit is recorded. Required.
    """
    is_hub_streamed: bool = False
    """hub: read records over the network instead of fetching whole files first: less disk, but a
    killed download starts over.
    """
    text_key: str = "text"
    """Corpus records (json, jsonl, hub): the key that holds the text."""
    format: Annotated[str, OneOf(FORMAT_NAMES)] = "auto"
    """Chats and preferences: which keys of a record hold what. auto: each record is of the first
    format whose keys it has; another name: records without its keys are dropped and counted.
    """
    max_documents: Count = 0
    """stdlib and hub: maximum number of documents; 0 takes all, and whole files of the hub."""


@dataclass(frozen=True, kw_only=True)  # no slots: MixedSourceConfig has a second base with slots
class ShareConfig:
    """The share of a source in a mixture of training documents."""

    weight: PositiveFloat = 1.0
    """Share of the tokens relative to the other weights; too small a source is repeated."""
    max_tokens: Count = 0
    """Use only as many of its documents as hold this many tokens; 0 uses all."""
    max_bytes: Count = 0
    """Use only as many of its documents as hold this many bytes of text; 0 uses all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedSourceConfig(SourceConfig, ShareConfig):
    """One of several sources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig(SourceConfig):
    """One source, or several."""

    sources: tuple[MixedSourceConfig, ...] = ()
    """Several sources; all settings beside this are then ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedMixtureConfig(MixtureConfig):
    """A further dataset."""

    name: str
    """Begins with corpus-, chats- or preferences-, which says what it holds: `chats-math`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """The raw data: text for pretraining, chats and preference pairs for the stages after it."""

    corpus: MixtureConfig = field(default_factory=MixtureConfig)
    """Documents of plain text."""
    chats: MixtureConfig = field(default_factory=MixtureConfig)
    """Conversations, in one of the formats of llm/data/raw/record_formats.py."""
    preferences: MixtureConfig = field(default_factory=MixtureConfig)
    """Preference pairs: a prompt with a chosen and a rejected answer."""
    more: tuple[NamedMixtureConfig, ...] = ()
    """Further datasets, named by the setting `data` of the stages that train on them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GopherConfig:
    """The rules of Gopher, for English prose (Rae et al. 2021, arXiv:2112.11446, table A1).

    Words are separated by whitespace. A limit of 0 or 1 that no text can violate disables its rule.
    """

    min_words: Count = 50
    """Shorter documents are dropped."""
    max_words: Positive = 100_000
    """Longer documents are dropped."""
    min_mean_word_characters: NonNegativeFloat = 3.0
    """Minimum mean word length."""
    max_mean_word_characters: PositiveFloat = 10.0
    """Maximum mean word length."""
    max_hashes_per_word: NonNegativeFloat = 0.1
    """Number signs per word."""
    max_ellipses_per_word: NonNegativeFloat = 0.1
    """Ellipses per word."""
    max_bullet_lines_fraction: Fraction = 0.9
    """Share of lines that begin with a bullet point or a hyphen."""
    max_ellipsis_lines_fraction: Fraction = 0.3
    """Share of lines that end in an ellipsis."""
    min_alphabetic_words_fraction: Fraction = 0.8
    """Share of words with a letter."""
    min_stop_words: Count = 2
    """How many distinct words of the, be, to, of, and, that, have, with must occur."""
    max_duplicate_lines_fraction: Fraction = 0.3
    """Share of lines that occurred before in the document."""
    max_duplicate_paragraphs_fraction: Fraction = 0.3
    """Share of paragraphs that occurred before."""
    max_duplicate_line_characters_fraction: Fraction = 0.2
    """Share of characters in lines that occurred before."""
    max_duplicate_paragraph_characters_fraction: Fraction = 0.2
    """Share of characters in paragraphs that occurred before."""
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

    Lines that fail are removed; the remainder of the page must pass too.
    """

    has_terminal_punctuation: bool = True
    """Remove lines that do not end in . ? ! or a quotation mark, or that end in an ellipsis."""
    min_words_per_line: Count = 5
    """Remove lines of fewer words."""
    max_word_characters: Positive = 1000
    """Remove lines with a longer word."""
    has_no_javascript: bool = True
    """Remove lines that mention JavaScript, which ask to enable it."""
    has_no_policy: bool = True
    """Remove lines about cookies, privacy and terms of use."""
    has_no_citations: bool = True
    """Remove marks like [1], [edit] and [citation needed]."""
    min_sentences: Count = 3
    """Drop pages with fewer remaining sentences."""
    has_no_lorem_ipsum: bool = True
    """Drop pages with this placeholder text."""
    has_no_curly_bracket: bool = True
    """Drop pages with a curly bracket, which are code."""
    blocked_words: tuple[str, ...] = ()
    """Drop pages with one of these words, ignoring case. C4's own list is not included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicatesConfig:
    """Near duplicates, found by MinHash (Lee et al. 2021, arXiv:2107.06499) and compared by the
    Jaccard index of their word n-grams.
    """

    unit: Literal["none", "document"] = "none"
    """document: compare whole texts and chats, and keep one of each cluster."""
    min_jaccard: Annotated[float, Range(minimum=0.5, maximum=1)] = 0.8
    """Jaccard index from which two documents are near duplicates."""
    ngram_words: Positive = 5
    """Words in an n-gram; with more, each changed word lowers the index further."""
    min_words: Positive = 20
    """Documents of fewer words are never compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminationConfig:
    """Training documents that overlap with evaluation data (Brown et al. 2020, arXiv:2005.14165,
    appendix C).
    """

    action: Literal["none", "count", "drop"] = "none"
    """count or drop training documents that share an n-gram with validation documents, held-out
    chats (the corpus then depends on the chats), `evaluate.prompts` or `texts`.
    """
    ngram_words: Positive = 13
    """Words in an n-gram; fewer drop more documents."""
    texts: tuple[str, ...] = ()
    """Further texts to keep out of training, such as benchmark questions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingConfig:
    """Decompression limits: a zip bomb raises an error instead of filling the disk."""

    max_unpacked_bytes: Positive = 1 << 40
    """Maximum decompressed size of one compressed file or archive."""
    max_ratio: Annotated[float, Range(minimum=1)] = 200.0
    """Maximum decompressed bytes per byte of the file; 64 MiB are always allowed."""
    max_members: Positive = 100_000
    """Maximum members of an archive; each takes about 1 kB of memory in a zip file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """Clean raw files into distinct documents, split into train and validation.

    Steps run in the order of these settings.
    """

    decode_errors: Literal["replace", "skip", "strict"] = "replace"
    """Invalid UTF-8: replace it by U+FFFD and count it, skip and count the document, or raise an
    error.
    """
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    """Limits for compressed files and archives."""
    tool_turns: Literal["drop", "as_text"] = "drop"
    """Chats with tools. drop: they are dropped and counted; as_text: a call becomes text of the
    assistant, in JSON, and its result a message of the user.
    """
    text_document_bytes: Positive = 32_768
    """Plain text files are cut at blank lines into documents of about this many bytes."""
    line_ends: Literal["as_is", "lf"] = "as_is"
    """lf: replace all line ends, also carriage returns, by line feeds."""
    unicode_form: Literal["as_is", "nfc"] = "as_is"
    """nfc: compose characters (NFC). Not for code."""
    masks_emails: bool = False
    """Replace e-mail addresses by [email]."""
    masks_ip_addresses: bool = False
    """Replace public IP addresses, version 4 or 6, by [ip]."""
    filters: Literal["none", "gopher", "c4", "gopher+c4"] = "none"
    """Quality filters, each rule counted by itself. Chats and preferences are not filtered."""
    c4: C4Config = field(default_factory=C4Config)
    """Thresholds of C4's rules, which run first because they change the text."""
    gopher: GopherConfig = field(default_factory=GopherConfig)
    """Thresholds of Gopher's rules."""
    min_document_bytes: Positive = 1
    """Shorter documents are dropped and counted."""
    near_duplicates: NearDuplicatesConfig = field(default_factory=NearDuplicatesConfig)
    """Removal of near duplicates, after exact ones."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Training documents that overlap with the evaluation data."""
    split: Literal["hash", "tail"] = "hash"
    """hash: whole documents are chosen by their content hash; tail: the last characters of every
    text, as is usual for one long text. Chats are always split by hash.
    """
    validation_fraction: Annotated[float, Range(above=0, below=1)] = 0.05
    """Share of the documents, or of each text's characters, held out for validation."""
    shard_bytes: Positive = 128 << 20
    """Raw files are cleaned in shards of about this many bytes, each by one process and written to
    one file; starting a process takes as long as reading 30 MB. Only plain `.jsonl` files are cut.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTokenizerConfig:
    """How text becomes token ids. Vocabularies are learned from the training documents."""

    kind: Annotated[str, OneOf(TOKENIZER_KINDS)] = "bpe"
    """bpe: byte-level byte-pair encoding; gpt2: GPT-2's published vocabulary; sentencepiece: pieces
    learned by the library of that name; characters: an id per character of the training documents;
    bytes: an id per byte value.
    """
    vocab_size: Annotated[int, Range(minimum=264, maximum=1_000_000)] = 4096
    """bpe, sentencepiece: number of tokens: control tokens, 256 bytes, and learned ones. More means
    fewer tokens per byte.
    """
    pre_tokenization: Literal["code", "gpt2", "gpt4"] = "code"
    """bpe: where text is split before merging. gpt4: a word may take the sign before it; code: it
    may not, and underscores are letters; gpt2: extra spaces before a word are one token each.
    """
    max_digits: Annotated[int, Range(minimum=0, maximum=3)] = 3
    """bpe: most digits in one token; 0 is no limit, as in GPT-2."""
    algorithm: Literal["unigram", "bpe"] = "unigram"
    """sentencepiece: unigram prunes the least useful pieces; bpe merges the most frequent pair."""
    path: str = ""
    """gpt2: folder of the published `encoder.json` and `vocab.bpe`; empty: download them."""
    has_byte_fallback: bool = True
    """characters: encode characters outside the vocabulary by their bytes, with 256 more ids.
    Without it documents with such characters are left out.
    """
    chat_format: Annotated[str, OneOf(CHAT_FORMATS)] = "turns"
    """How chats are written with control tokens. A change makes a new tokenizer, so that models are
    trained again.
    """
    sample_bytes: Positive = 50_000_000
    """Most text to learn from, sampled by document; memory grows with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """From documents to packed sequences of tokens."""

    seq_len: Annotated[int, Range(minimum=8, maximum=1_048_576)] = 256
    """T: positions in a sequence, the context that the model is trained on."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """Of text. concatenate: one stream, cut every seq_len tokens; best_fit: documents that fit a
    sequence are not cut, and sequences may end in padding. Chats are always packed by best_fit.
    """
    long_chats: Literal["drop", "truncate_left", "truncate_right"] = "truncate_right"
    """Chats longer than a sequence: drop them, or cut off their beginning, but for a system message
    in front, or their end. Preference pairs longer than a sequence are dropped.
    """
    shard_bytes: Positive = 64 << 20
    """Size of the documents packed together, by one process that holds all their tokens in memory.
    More means fewer, larger files, and less padding.
    """
    shares: tuple[ShareConfig, ...] = ()
    """Copied from `download.<role>.sources`; not to be set here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of the transformer. Vocabulary and context come from tokenizer and packing."""

    num_layers: Positive = 4
    """Transformer blocks, one after another."""
    d_model: Positive = 256
    """C: width of the residual stream."""
    num_heads: Positive = 4
    """H: query heads."""
    num_kv_heads: Positive = 4
    """K: key/value heads; must divide num_heads. Fewer: a smaller cache; 1: multi-query."""
    head_dim: Count = 0
    """D: width of a head, even with rope; 0: d_model / num_heads."""
    d_ff: Positive = 704
    """F: feed-forward width, about 8/3 d_model when gated, 4 d_model when not."""
    positions: Literal["rope", "learned"] = "rope"
    """rope: rotary embedding of queries and keys; learned: a position embedding is added."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary wavelengths; raise it for longer contexts."""
    rope_scaling: Literal["none", "llama3"] = "none"
    """llama3: stretch the long wavelengths, for contexts beyond the trained one."""
    rope_factor: Annotated[float, Range(minimum=1)] = 8.0
    """llama3: factor by which the longest wavelengths are stretched."""
    rope_low_frequency_factor: PositiveFloat = 1.0
    """llama3: wavelengths above rope_original_seq_len / this are stretched by rope_factor."""
    rope_high_frequency_factor: PositiveFloat = 4.0
    """llama3: wavelengths below rope_original_seq_len / this are unchanged."""
    rope_original_seq_len: Positive = 8192
    """llama3: the context before stretching."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """layernorm also centers each vector, and has a bias if `has_biases`."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square, or the variance, under the root."""
    has_qk_norm: bool = False
    """RMSNorm on each head's query and key: bounds attention scores."""
    mlp: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"
    """swiglu and geglu are gated (a third matrix); gelu and relu2 (ReLU squared) are not."""
    has_biases: bool = False
    """Biases in all linear layers of the blocks, as in GPT-2."""
    tie_embeddings: bool = True
    """One matrix serves as embedding and head."""
    is_embedding_scaled: bool = False
    """Multiply embeddings by sqrt(d_model), as in Gemma."""
    attention_soft_cap: NonNegativeFloat = 0.0
    """Attention scores x become cap * tanh(x / cap), as in Gemma 2; 0: no cap."""
    logit_soft_cap: NonNegativeFloat = 0.0
    """Logits x become cap * tanh(x / cap); 0: no cap."""
    sliding_window: Count = 0
    """Positions a query attends to, itself included; 0: all before it."""
    full_attention_every: Count = 0
    """With a window: every n-th layer attends to all positions; 0: none does."""
    is_causal: bool = True
    """False: attention in both directions, trained by masked language modeling."""
    dropout: Annotated[float, Range(minimum=0, below=1)] = 0.0
    """Share zeroed in training: of embeddings, attention probabilities and block outputs."""
    init: Literal["gpt2", "zero"] = "gpt2"
    """Initialization. gpt2: std 0.02, smaller with depth for weights that add to the residual
    stream; zero: std 1 / sqrt(inputs), and zero for these weights and an untied head.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationConfig:
    """Settings of the training loop, shared by pretraining and fine-tuning."""

    num_steps: Positive = 500
    """Optimizer steps."""
    global_batch_size: Positive = 32
    """Sequences per optimizer step, over all processes and micro-batches."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of Muon."""
    muon_momentum: Annotated[float, Range(minimum=0, below=1)] = 0.95
    """Muon's momentum; lower values suit trainings of a few hundred steps."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Decay after warmup; wsd stays at the peak and decays over the last `decay_fraction`."""
    warmup_steps: Count = 20
    """Steps over which the learning rate rises linearly to its peak."""
    decay_fraction: Annotated[float, Range(above=0, maximum=1)] = 0.3
    """wsd: share of the steps over which the learning rate finally decays, linearly."""
    final_learning_rate_fraction: Fraction = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""
    beta1: Annotated[float, Range(minimum=0, below=1)] = 0.9
    """AdamW's first-moment decay."""
    beta2: Annotated[float, Range(minimum=0, below=1)] = 0.95
    """AdamW's second-moment decay."""
    max_gradient_norm: PositiveFloat = 1.0
    """Clip the norm of the whole gradient to this value."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Of matrix products, where the hardware has it; weights stay in fp32. fp16 scales the loss."""
    masked_fraction: Annotated[float, Range(above=0, below=1)] = 0.15
    """Share of the tokens that are masked, for a model that is not causal."""
    document_mask: bool = False
    """Restrict attention to a token's own document; off: also to earlier ones in the sequence."""
    averaging: Literal["none", "ema", "snapshots"] = "none"
    """Weights of the finished model. none: those of the last step; ema: exponential moving average
    over the steps; snapshots: mean of the last `averaged_snapshots` snapshots.
    """
    ema_decay: Annotated[float, Range(above=0, below=1)] = 0.999
    """ema: the share of the average that stays at each step."""
    averaged_snapshots: Positive = 5
    """snapshots: how many are averaged."""
    snapshot_every_steps: Positive = 10
    """snapshots: steps between two, counted back from the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(OptimizationConfig):
    """From packed text to a base model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation: W + alpha / rank * B A with W frozen (Hu et al. 2021,
    arXiv:2106.09685).
    """

    rank: Count = 0
    """Rows of A; 0: train all weights, without an adapter."""
    alpha: PositiveFloat = 16.0
    """The product B A is scaled by alpha / rank."""
    dropout: Annotated[float, Range(minimum=0, below=1)] = 0.0
    """Share of an adapter's inputs zeroed in training."""
    targets: tuple[str, ...] = ("query", "key", "value", "output", "gate", "up", "down")
    """Layers of the blocks that get an adapter, by name. The default stands for all of them: gate
    is left out where the MLP has none. Named explicitly, a layer must exist.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class BestConfig:
    """Keep the weights of the lowest validation loss instead of the last ones."""

    every_steps: Count = 0
    """Steps between validations that decide; 0: keep the last weights."""
    num_sequences: Positive = 256
    """Validation sequences measured each time."""
    patience: Count = 0
    """Stop training after this many validations without a new best; 0: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningConfig(OptimizationConfig):
    """Settings of all stages that continue to train a model."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train a low-rank adapter instead of all weights."""
    best: BestConfig = field(default_factory=BestConfig)
    """Selection of the best weights, and early stopping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(TuningConfig):
    """From a model and packed chats, or text, to a model of these."""

    data: str = "chats"
    """The dataset: corpus, chats, or a name in `download.more`."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Targets in chats: the assistant's messages, or every token."""
    replay_fraction: Annotated[float, Range(minimum=0, below=1)] = 0.0
    """Share of the sequences of each step that are pretraining text, against forgetting."""
    neftune_alpha: NonNegativeFloat = 0.0
    """Uniform noise on embeddings, of this size over sqrt(T d_model) (NEFTune, Jain et al. 2023,
    arXiv:2310.05914); 0: none. 5 is usual.
    """
    new_token_embeddings: Literal["keep", "mean"] = "keep"
    """mean: all control tokens but `<|bos|>`, which are in no text, start as the mean of the
    embeddings of text tokens. For the first stage on chats: a later one refuses it.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedFinetuneConfig(FinetuneConfig):
    """One of several fine-tuning stages."""

    name: str
    """Of its model: prefix of its metrics and of its run in MLflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneStages(FinetuneConfig):
    """One fine-tuning stage, or several."""

    stages: tuple[NamedFinetuneConfig, ...] = ()
    """Several in a row, each from the model before. They share the settings beside this, unless
    they have their own.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoConfig:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: PositiveFloat = 0.1
    """How strongly the model is held to the reference."""
    label_smoothing: Annotated[float, Range(minimum=0, below=0.5)] = 0.0
    """Assumed share of pairs whose sides are swapped (conservative DPO)."""
    is_length_normalized: bool = False
    """Compare mean instead of summed log-probabilities of the answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig:
    """Group relative policy optimization with verifiable rewards (Shao et al. 2024,
    arXiv:2402.03300).
    """

    group_size: Annotated[int, Range(minimum=2)] = 8
    """Answers sampled to each prompt; must divide global_batch_size, which counts answers."""
    max_new_tokens: Positive = 64
    """Maximum length of an answer in tokens."""
    temperature: PositiveFloat = 1.0
    """Of sampling."""
    rewards: tuple[str, ...] = ("exact_match",)
    """Reward functions, added up: exact_match, number, json, format, regex:PATTERN, or
    MODULE:FUNCTION of your own. `2*NAME` counts twice.
    """
    clip: Annotated[float, Range(above=0, below=1)] = 0.2
    """The ratio of new to old probability is clipped to 1 - clip and 1 + clip."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the starting model; 0 does not compute it."""
    divides_by_spread: bool = True
    """Divide advantages by the standard deviation of their group's rewards."""
    updates_per_sampling: Positive = 1
    """Optimizer steps on the same answers before new ones are sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignConfig(TuningConfig):
    """From a chat model to one that prefers better answers, by preference pairs or by rewards."""

    method: Literal["dpo", "grpo"] = "dpo"
    """dpo: learn from pairs of a chosen and a rejected answer; grpo: sample answers and reinforce
    those of higher reward.
    """
    data: str = ""
    """The dataset; empty: preferences for dpo, chats for grpo, which takes each chat's last answer
    as the reference.
    """
    dpo: DpoConfig = field(default_factory=DpoConfig)
    """Settings of dpo."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """Settings of grpo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedAlignConfig(AlignConfig):
    """One of several alignment stages."""

    name: str
    """Of its model: prefix of its metrics and of its run in MLflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignStages(AlignConfig):
    """One alignment stage, or several."""

    stages: tuple[NamedAlignConfig, ...] = ()
    """Several in a row, each from the model before. They share the settings beside this, unless
    they have their own.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluation of every trained model."""

    models: tuple[str, ...] = ()
    """Names of the models, copied from the stages that train them; not to be set here."""
    prompts: tuple[str, ...] = ("The ", "def ", "import ")
    """Continued by every model, side by side in the report."""
    max_new_tokens: Positive = 64
    """Maximum length of an answer or a continuation, in tokens."""
    temperature: NonNegativeFloat = 0.8
    """Of continuations; 0 decodes greedily. Answers to instructions are always greedy."""
    top_k: Count = 0
    """Continuations are sampled from this many most probable tokens; 0 from all."""
    top_p: Annotated[float, Range(above=0, maximum=1)] = 1.0
    """Continuations are sampled from the fewest most probable tokens that sum to this."""
    min_p: Fraction = 0.0
    """Continuations are sampled from tokens with this share of the top token's probability."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1, tokens already in a continuation or its prompt become less probable."""
    num_instructions: Positive = 200
    """Held-out instructions to answer for the exact match; more lowers its standard error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how. Never part of a cache key."""

    artifacts_dir: str = "artifacts"
    """Folder of all artifacts, locks and logs."""
    project: str = "fromscratch"
    """First part of the names of MLflow experiments."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: every visible GPU, else the CPU."""
    num_processes: Count = 0
    """Training processes; 0: one per visible GPU, or one without a GPU. Best a divisor of
    global_batch_size; otherwise some processes wait for others in each step.
    """
    micro_batch_size: Count = 0
    """Upper limit of sequences per forward pass of one process; 0: as many as memory allows. The
    size used divides a process's share as evenly as possible.
    """
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile; auto: on a GPU, where minutes of training win back the compile time."""
    deterministic: Literal["auto", "always", "never"] = "auto"
    """Use deterministic kernels only, so that a training, resumed or not, gives the same bits on
    the same kind of device. auto: on a CPU, where it costs nothing, not on a GPU.
    """
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest: less memory, a third slower."""
    num_threads: Count = 0
    """CPU threads per process; 0 divides the cores among the processes."""
    shard_runner: Literal["processes", "dask", "ray"] = "processes"
    """Where the shards of clean and pack run: in processes on this machine, or on a cluster."""
    shard_workers: Count = 0
    """Shards done in parallel; 0: one per core, or as many as the cluster has workers."""
    cluster_address: str = ""
    """Address of the Dask scheduler or Ray head; empty starts a cluster on this machine."""
    checkpoint_every_steps: Positive = 50
    """Steps between checkpoints; a kill loses at most this many."""
    keep_checkpoints: Annotated[int, Range(minimum=2)] = 2
    """Newest checkpoints kept while a stage runs; at least two, in case one is damaged."""
    validate_every_steps: Positive = 50
    """Steps between validations."""
    validation_sequences: Positive = 64
    """Validation sequences measured while training; the report measures all."""
    log_every_steps: Positive = 1
    """Steps between points of the training curves."""
    max_restarts: Count = 1
    """How often a stage whose process was killed by a signal is restarted."""
    stall_seconds: Positive = 900
    """A training that reports nothing for this long is stopped and restarted."""
    tracking_uri: str = ""
    """MLflow server or file; empty: MLFLOW_TRACKING_URI, or a SQLite file in artifacts_dir."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole recipe, resolved: one section per stage, and `runtime`."""

    name: str
    """The recipe's name."""
    description: str = ""
    """One line for people."""
    seed: Count = 1
    """Every random choice derives from it and its purpose."""
    stages_after_pretrain: tuple[str, ...] = ("finetune",)
    """Training stages after pretraining; each starts from the model of the one before."""
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
    finetune: FinetuneStages = field(default_factory=FinetuneStages)
    """Chat model."""
    align: AlignStages = field(default_factory=AlignStages)
    """Aligned model."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Report."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Where and how."""


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


def mixture_of(download: DownloadConfig, dataset: str) -> MixtureConfig:
    """Return the source of a dataset: `corpus`, `chats`, `preferences`, or one of `more`."""
    named = {mixture.name: mixture for mixture in download.more}
    return named[dataset] if dataset in named else getattr(download, dataset)
