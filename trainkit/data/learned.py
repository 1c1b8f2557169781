"""Tokenizers that a text makes, each as the text of a tokenizer.json."""

from collections.abc import Iterable

END = "<|endoftext|>"


def bpe(vocab: int, texts: Iterable[str]) -> str:
    """Byte pairs (Sennrich et al. 2016, arXiv:1508.07909) of bytes: every text can be written in them."""
    from tokenizers import ByteLevelBPETokenizer

    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(texts, vocab_size=vocab, special_tokens=[END], show_progress=False)
    text: str = learner._tokenizer.to_str()
    return text


def wordpiece(vocab: int, texts: Iterable[str]) -> str:
    """Pieces of lower-case words, with special tokens around a text that stands alone (Devlin et al. 2019,
    arXiv:1810.04805)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learner.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=specials, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    around = [(name, learner.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    learner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    text: str = learner.to_str()
    return text


LEARNED = {"bpe": bpe, "wordpiece": wordpiece}
