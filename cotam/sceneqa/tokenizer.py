"""The tokenizer of the packaged CLIP and MLLM: the words of SceneQA, and single characters for everything else."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from cotam.sceneqa.scene import COLOURS, KINDS, RADII, SHAPES

PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>"
TOKEN_IDS = {t: k for k, t in enumerate((PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT))}  # of the special tokens
_PHRASES = (
    "what does the sign say", "what kind of scene is this", "how many are there", "what colour is the",
    "is there a an", "is the left of the", "which is larger the or the", "yes no", "a scene a sign that says",
)  # fmt: skip


def build_tokenizer() -> Tokenizer:
    """A WordPiece tokenizer: words of the questions and captions are tokens, others are spelled. Signs are read by
    their letters, since no sign's text is a word of its own. Case is dropped."""
    words = [w for phrase in _PHRASES for w in phrase.split()]
    words += [*KINDS, *SHAPES, *(s + ("es" if s.endswith("s") else "s") for s in SHAPES), *COLOURS, *RADII]
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = dict.fromkeys((*TOKEN_IDS, *characters, *(f"##{c}" for c in characters), *words))
    vocabulary = {token: k for k, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(list(TOKEN_IDS))
    return tokenizer
