"""Trains the sample's language model on Python's reference manual: `python samples/text/train.py [FOLDER]`.

The text is `pydoc_data.topics` of the standard library, so it differs a little from one version of Python to the next.
Writes the folder gpt (config.json, model.safetensors, tokenizer.json, as transformers keeps a model), test.npz: windows
of text that training never saw, and the token that follows each; and calibration.npz: windows that it saw.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 0
EPOCHS = 12
BATCH = 16
LENGTH = 128
VOCABULARY = 1024
END = "<|end|>"


def read() -> tuple[list[str], list[str]]:
    """Topics to train on and, every tenth, to test on; no long line is in twice."""
    known: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for number, topic in enumerate(sorted(topics)):
        lines = []
        for line in topics[topic].splitlines():
            if len(line) > 20 and line in known:  # topics quote each other
                continue
            known.add(line)
            lines.append(line)
        parts[number % 10 == 0].append("\n".join(lines))
    return parts


def tokenizer_of(texts: list[str]) -> Tokenizer:
    """Pairs of bytes, joined as often as they are common."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in a row, each closed by the end token."""
    end = tokenizer.token_to_id(END)
    return np.array([token for text in texts for token in (*tokenizer.encode(text).ids, end)])


def train(tokens: torch.Tensor, end: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config).train()
    per_epoch = len(tokens) // (BATCH * LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=EPOCHS * per_epoch)
    for epoch in range(EPOCHS):
        shift = int(torch.randint(LENGTH, ()))  # windows that begin elsewhere in each epoch
        starts = torch.arange(shift, len(tokens) - LENGTH - 1, LENGTH)
        order = starts[torch.randperm(len(starts))]
        total = 0.0
        for number in range(len(order) // BATCH):
            at = order[number * BATCH : (number + 1) * BATCH, None] + torch.arange(LENGTH + 1)
            window = tokens[at]
            optimizer.zero_grad()
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if schedule.last_epoch < EPOCHS * per_epoch:
                schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: {total / max(number + 1, 1):.3f} nats a token", flush=True)
    return model.eval()


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    known, unknown = read()
    tokenizer = tokenizer_of(known)
    end = tokenizer.token_to_id(END)
    tokens, test = tokens_of(tokenizer, known), tokens_of(tokenizer, unknown)
    model = train(torch.from_numpy(tokens), end).half()  # half of the file; it is loaded as float32
    (folder / "gpt").mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "gpt")
    tokenizer.save(str(folder / "gpt" / "tokenizer.json"))
    windows = test[: (len(test) - 1) // 64 * 64].reshape(-1, 64)
    following = np.array([*test[64 : len(windows) * 64 + 1 : 64]])
    np.savez_compressed(folder / "test.npz", ids=windows[:256], next=following[:256])
    seen = tokens[: len(tokens) // 64 * 64].reshape(-1, 64)
    np.savez_compressed(folder / "calibration.npz", ids=seen[:: len(seen) // 128][:128])
    with torch.inference_mode():
        held = torch.from_numpy(test[: len(test) // LENGTH * LENGTH].reshape(-1, LENGTH))
        logits = model.float()(input_ids=held, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), held[:, 1:].flatten())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, perplexity {loss.exp():.2f} on {held.numel()} tokens that it never saw")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
