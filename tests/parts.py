"""Parts of models on disk: a text model of transformers with its tokenizer."""

from pathlib import Path

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WORDS = ("[PAD]", "[UNK]", "a", "photo", "dogs", "red", "green", "blue", "bar")


def write_text_model(folder: Path) -> None:
    """Write a small BERT with random weights and a tokenizer of words."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    write_words(folder)


def write_words(folder: Path) -> None:
    """Write a tokenizer of words."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
