"""Text in, batches out.

`sources` reads documents and keeps their tokens, `tokenizer` makes the tokens, `blend` orders documents, `packing` cuts
the stream into rows and hands each rank its part.
"""

from nemo_lite.data.packing import Batch, PackedLoader, ValidationBatches, prepare, validation_batches
from nemo_lite.data.sources import Document, ReadStats, TokenSource, documents, open_source
from nemo_lite.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, train_bpe

__all__ = [
    "Batch",
    "Document",
    "PackedLoader",
    "ReadStats",
    "TokenSource",
    "Tokenizer",
    "ValidationBatches",
    "check_vocabulary",
    "documents",
    "load_tokenizer",
    "open_source",
    "prepare",
    "train_bpe",
    "validation_batches",
]
