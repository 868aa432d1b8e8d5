"""A tokenizer of bytes, for prompts that have to decode to what was written."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aquakv.models.loading import LoadedModel
from tiny_models import build

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())

#: Bytes, and the end of a sequence.
VOCAB = len(_BYTES) + 2
EOS = len(_BYTES)

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}<|assistant|>"


def byte_tokenizer(chat_template=None, **more):
    backend = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(_BYTES)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<bos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **more)
    tokenizer.chat_template = chat_template
    return tokenizer


@functools.cache
def loaded(max_position_embeddings=4096):
    """Return a tiny random model that takes bytes."""
    model = build(vocab_size=VOCAB, max_position_embeddings=max_position_embeddings)
    return LoadedModel(model, byte_tokenizer(), "tiny", "tiny")
