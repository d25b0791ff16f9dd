"""The pipeline, from raw text to trained models and their report, one line a stage."""

from llm.config import RunConfig
from llm.models import dataset_of, trainings
from tasks.stages import (
    PipelineStep,
    clean,
    download,
    evaluate,
    pack,
    pretrain,
    train_further,
    train_tokenizer,
)


def language_model(config: RunConfig) -> PipelineStep:
    """Return the last step, the report, from which all others are reached as inputs."""
    chats = clean(download("chats", config.download), config.clean)
    corpus = clean(download("corpus", config.download), config.clean, held_out=chats)
    tokenizer = train_tokenizer(corpus)
    sequences = {"corpus": pack(corpus, tokenizer), "chats": pack(chats, tokenizer)}
    models = [pretrain(sequences["corpus"], tokenizer)]
    for training in trainings(config)[1:]:  # finetune, align
        if (name := dataset_of(training.settings)) not in sequences:
            documents = clean(download(name, config.download), config.clean)
            sequences[name] = pack(documents, tokenizer)
        models.append(train_further(training, models[-1], sequences[name], sequences["corpus"]))
    return evaluate(models, sequences, tokenizer)
