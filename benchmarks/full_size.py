#!/usr/bin/env python
"""Rehearse the large preset at its real size with random weights: does it load, answer and train, in how much memory?

    python benchmarks/full_size.py --folder full-size/                       # writes 8 GB, then loads them
    python benchmarks/full_size.py --folder full-size/ --stages 4bit qlora   # only these

The weights have the configuration of Phi-3-mini-4k-instruct and CLIP ViT-L/14 at 336 pixels, in bfloat16. Each stage
runs in a process of its own and prints its seconds and its peak memory. The words it writes mean nothing.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STAGES = ("write", "none", "4bit", "qlora")
TEXT = {
    "vocab_size": 32_064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QUESTION, ANSWER = "What is in this picture?", "A camera on a tripod."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the weights are written")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which stages to run")
    parser.add_argument("--layers", type=int, default=32, help="fewer layers of the language model, to try the script")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        return run(options.stage, options.folder, options.layers)
    for stage in options.stages:
        command = [sys.executable, __file__, "--folder", str(options.folder), "--layers", str(options.layers)]
        if subprocess.run([*command, "--stage", stage]).returncode:
            sys.exit(f"The stage {stage} failed.")


def run(stage: str, folder: Path, layers: int) -> None:
    start = time.perf_counter()
    write(folder, layers) if stage == "write" else use(stage, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kilobytes
    print(f"{stage}: {time.perf_counter() - start:.0f} s, peak memory {peak:.1f} GB", flush=True)


def write(folder: Path, layers: int) -> None:
    """Random weights in the format of LlavaForConditionalGeneration, in several files."""
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Phi3Config,
    )

    tokenizer = make_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=Phi3Config(**{**TEXT, "num_hidden_layers": layers}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name and name.endswith("weight") else weight.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size="2GB")
    size = {"height": 336, "width": 336}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=TOWER["patch_size"],
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def make_tokenizer():
    """A small tokenizer with Phi-3's special tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([QUESTION, ANSWER], vocab_size=400, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
    )


def use(stage: str, folder: Path) -> None:
    """Loads the weights; then one answer about a picture, or one step of QLoRA."""
    import torch
    from PIL import Image

    from mmchat.checkpoints.weights_folder import load_model, preset_trained
    from mmchat.conversation import Message, SamplingOptions
    from mmchat.inference.generation import generate_texts
    from mmchat.models.chat_formats import chat_format_of
    from mmchat.models.image_encoder import load_image_encoder
    from mmchat.models.prompt import encode

    start = time.perf_counter()
    preset, is_training = preset_trained(folder), stage == "qlora"
    quantization = "none" if stage == "none" else "4bit"
    model, tokenizer = load_model(preset, folder, torch.bfloat16, quantization=quantization, trainable=is_training)
    encoder = load_image_encoder(preset.image_encoder)
    print(f"{stage}: loaded in {time.perf_counter() - start:.0f} s", flush=True)
    picture = Image.open(ROOT / "examples" / "camera.jpg").convert("RGB")
    features = encoder.encode([picture]).clone()  # [1, 576, 1024]
    messages = [Message("user", QUESTION, [picture])]
    if is_training:
        messages.append(Message("assistant", ANSWER))
    encoded = encode(
        messages, tokenizer, chat_format_of(preset), model.tokens_per_image, add_generation_prompt=not is_training
    )
    token_ids = torch.tensor([encoded.token_ids])  # [1, length]
    start = time.perf_counter()
    if is_training:
        loss = step(model, token_ids, encoded.is_answer, features, preset.language_model.name)
        print(f"{stage}: one step, loss {loss:.2f}, {time.perf_counter() - start:.0f} s", flush=True)
        return
    with torch.inference_mode():
        prompt = model.splice(token_ids, features)[0]  # [length, hidden_size]
    generate_texts(model.language_model, tokenizer, [prompt], SamplingOptions(max_new_tokens=8))
    print(f"{stage}: 8 tokens about {len(prompt)} in {time.perf_counter() - start:.0f} s", flush=True)


def step(model, token_ids, is_answer, features, name: str) -> float:
    """One optimizer step of a LoRA adapter on 4-bit weights, and of the projector."""
    import torch

    from mmchat.models.language_model import add_adapter
    from mmchat.models.vision_language_model import IGNORE_INDEX
    from mmchat.training.loss import next_token_loss

    model.language_model = add_adapter(model.language_model, rank=16, alpha=32, dropout=0.0, base_name=name)
    model.causal_language_model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    labels = token_ids.masked_fill(~torch.tensor([is_answer]), IGNORE_INDEX)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    mask = torch.ones_like(token_ids)
    loss = next_token_loss(*model(input_ids=token_ids, attention_mask=mask, labels=labels, image_features=features))
    loss.backward()
    if not all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained):
        sys.exit("A trainable weight has no finite gradient.")
    optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    main()
