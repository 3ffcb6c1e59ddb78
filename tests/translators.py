"""Little translators in the layouts of the published ones, made by their own classes."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchEncoding,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from majicflux.tools.little_world.captions import caption
from majicflux.tools.little_world.scenes import draw_scene
from majicflux.translation.translator import INSTRUCTION

LEARNT = {  # what the Marian model translates, and nothing else
    "一座红色的房子": "A red house.",
    "两棵松树": "Two pine trees.",
    "雨夜": "Rainy night.",
    "霓虹灯光": "Neon lights.",
    "一辆": "A",
    "红色": "red",
    "的汽车": "car",
    "下雪": "falling snow",
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}"
)
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]


def captions(chinese: bool, number: int = 300) -> list[str]:
    r = random.Random(0)
    return [caption(draw_scene(r), r, chinese) for _ in range(number)]


def write_marian(folder: Path, pairs: dict[str, str] = LEARNT, steps: int = 150) -> Path:
    """A Marian model that has learnt `pairs` by heart, as save_pretrained writes it."""
    folder.mkdir(parents=True)
    texts = {"source": [*captions(True), *pairs], "target": [*captions(False), *pairs.values()]}
    vocabulary = {"</s>": 0, "<unk>": 1}
    for name, lines in texts.items():
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines), model_prefix=str(folder / name), vocab_size=600,
            hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
        )  # fmt: skip
        spm = folder / f"{name}.spm"
        (folder / f"{name}.model").rename(spm)
        (folder / f"{name}.vocab").unlink()
        model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
        for piece in map(model.IdToPiece, range(model.GetPieceSize())):
            vocabulary.setdefault(piece, len(vocabulary))
    vocabulary["<pad>"] = pad = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = MarianTokenizer(
        *(str(folder / name) for name in ("source.spm", "target.spm", "vocab.json"))
    )
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=pad + 1, d_model=64, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=512, scale_embedding=True, dropout=0.0,
        activation_function="swish", pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad,
        forced_eos_token_id=0,
    )  # fmt: skip
    model = MarianMTModel(config)
    model.generation_config.update(num_beams=4, max_length=512, bad_words_ids=[[pad]])
    batch = tokenizer([*pairs], text_target=[*pairs.values()], return_tensors="pt", padding=True)
    learn(model, batch, pad, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learn(model: PreTrainedModel, batch: BatchEncoding, pad: int, steps: int) -> None:
    batch["labels"][batch["labels"] == pad] = -100  # which is not learnt
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


def write_qwen(folder: Path, family: str, pairs: dict[str, str], steps: int = 150) -> Path:
    """A model of the family ("qwen2" or "qwen3") that reads bytes and has learnt `pairs`."""
    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token=SPECIAL[0], pad_token=SPECIAL[2],
        additional_special_tokens=SPECIAL[1:2],
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = kinds[family]
    sizes = {"head_dim": 16} if family == "qwen3" else {}
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True, **sizes,
        )
    )  # fmt: skip
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": chinese}],
            tokenize=False, add_generation_prompt=True, enable_thinking=False,
        )
        for chinese in pairs
    ]  # fmt: skip
    answered = [
        f"{a}{english}{SPECIAL[0]}" for a, english in zip(asked, pairs.values(), strict=True)
    ]
    batch = tokenizer(answered, return_tensors="pt", padding=True, padding_side="right")
    batch["labels"] = batch["input_ids"].clone()
    for row, text in zip(batch["labels"], asked, strict=True):
        row[: len(tokenizer(text).input_ids)] = tokenizer.pad_token_id
    learn(model, batch, tokenizer.pad_token_id, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def files(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.iterdir())
