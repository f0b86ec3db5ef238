"""Which family a model is of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ia3.adapter.config import TaskType
from ia3.adapter.pretrained import task_type
from ia3.scoring.decoder import Decoder
from ia3.scoring.encoder import Encoder, SentenceEncoder
from ia3.scoring.encoder_decoder import EncoderDecoder
from ia3.scoring.family import Family, base_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_FAMILIES = {
    TaskType.CAUSAL_LM: Decoder,
    TaskType.SEQ_2_SEQ_LM: EncoderDecoder,
    TaskType.SEQ_CLS: Encoder,
    TaskType.FEATURE_EXTRACTION: SentenceEncoder,
}


def family_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Family:
    """A model and its tokenizer as one of its family."""
    return _FAMILIES[task_type(base_of(model))](model, tokenizer)
