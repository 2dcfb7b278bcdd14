"""The step of transformers' own Llama under torch, for the table of docs/performance.md.

Run by hand, with torch: `python tests/beside_transformers.py [LAYERS WIDTH MLP HEADS ROWS]`. Two
towers, rows of 1,024 tokens without padding, passages of 128, full logits, an in-batch loss and
torch's AdamW, in bfloat16 by autocast and in float32.
"""

import statistics
import sys
import time

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

TOKENS, PASSAGE, VOCAB, STEPS = 1024, 128, 32_000, 5


def main() -> None:
    layers, width, mlp, heads, rows = map(int, sys.argv[1:] or (16, 2048, 5632, 32, 8))
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=2 * TOKENS, **shape)
        gen, ctx = LlamaForCausalLM(config), LlamaModel(config)
        text = torch.randint(0, VOCAB, (rows, TOKENS))
        passages = torch.randint(0, VOCAB, (rows * TOKENS // PASSAGE, PASSAGE))
        own = torch.arange(len(passages))
    optimizer = torch.optim.AdamW([*gen.parameters(), *ctx.parameters()], lr=1e-5)

    def step(dtype) -> float:
        start = time.perf_counter()
        with torch.autocast(text.device.type, dtype, enabled=dtype != torch.float32):
            read = gen(input_ids=text, labels=text, output_hidden_states=True)
            vectors = ctx(input_ids=passages).last_hidden_state[:, -1]
            queries = read.hidden_states[-1][:, PASSAGE - 1 :: PASSAGE].reshape(-1, width)
            loss = read.loss + 0.01 * cross_entropy((queries @ vectors.T).float(), own)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for dtype in (torch.bfloat16, torch.float32):
        try:
            step(dtype)
        except torch.OutOfMemoryError:
            print(f"{dtype}: out of memory")
            continue
        median_s = statistics.median(step(dtype) for _ in range(STEPS))
        print(f"{dtype}: {median_s:.4f} s a step, {2 * text.numel() / median_s:,.0f} tokens/s")


if __name__ == "__main__":
    main()
