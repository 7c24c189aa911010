"""The demo model's own small tokenizer and Qwen3 text encoder."""

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from training.captions import canonical, paraphrase
from training.clips import BACKGROUNDS, all_combinations

VOCABULARY_SIZE = 768
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, lower-cased, learnt from captions; any text can be encoded."""
    chance = random.Random(f"tokenizer-{seed}")
    captions = [
        caption
        for combination in all_combinations()
        for background in BACKGROUNDS
        for caption in (
            canonical(combination, background),
            *(paraphrase(combination, background, chance) for _ in range(8)),
        )
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=4096,
    )


def make_text_encoder(vocabulary_size: int) -> Qwen3Model:
    """Three layers, of which two are used: Z-Image reads the last hidden state but one."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            rope_theta=10000.0,
            tie_word_embeddings=True,
        )
    )


def save_text_encoder(
    tokenizer: PreTrainedTokenizerFast, encoder: Qwen3Model, folder: Path
) -> None:
    """Write tokenizer/ and text_encoder/ in diffusers' layout."""
    # The last call's truncation and padding would be saved, and cut every later text.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder", safe_serialization=True)
