#!/usr/bin/env python
"""Rehearse a large preset at its real size with random weights: is it fetched, does it load, answer and train?

    python benchmarks/full_size.py --folder full-size/                               # llava-phi-3
    python benchmarks/full_size.py --folder full-size/ --preset phi-3.5
    python benchmarks/full_size.py --folder full-size/ --stages 4bit qlora           # only these

It writes repositories with the preset's names and configurations (8 GB in bfloat16) and fetches them (8 GB more) from a
local server with the Hub's file API, through the code that fetches the real ones. Each stage runs in a process of its
own and prints its seconds and its peak memory. The words it writes mean nothing.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STAGES = ("write", "fetch", "none", "4bit", "qlora")
PHI_3 = {
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
ROTARY_PAIRS = 3072 // 32 // 2
LONG_ROPE = {
    "max_position_embeddings": 131_072,
    "original_max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * ROTARY_PAIRS,
        "long_factor": [1.0 + pair for pair in range(ROTARY_PAIRS)],  # the published ones rise to 64
        "original_max_position_embeddings": 4096,
    },
}
VIT_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
PUBLISHED_ADAPTER = {"self_attn.o_proj": (3072, 3072), "mlp.down_proj": (8192, 3072)}  # of phi-3.5: in, out
PUBLISHED_PROJECTOR = {"layer1.weight": (1024, 512), "layer1.bias": (1024,)}
PUBLISHED_PROJECTOR |= {"layer2.weight": (3072, 1024), "layer2.bias": (3072,)}
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QUESTION, ANSWER = "What is in this picture?", "A camera on a tripod."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is written")
    parser.add_argument("--preset", choices=WRITERS, default="llava-phi-3", help="which preset (default: llava-phi-3)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which stages to run")
    parser.add_argument("--layers", type=int, default=32, help="fewer layers of the language model, to try the script")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = (options.folder / options.preset).resolve()
    if options.stage:
        return run(options.stage, options.preset, folder / "published", options.layers)
    for stage in options.stages:
        run_apart(stage, options.preset, folder, [*sys.argv[1:], "--stage", stage])


def run_apart(stage: str, preset: str, folder: Path, arguments: list[str]) -> None:
    """Runs a stage in a process of its own, which meets the local server as its Hub and an empty cache."""
    from mmchat.presets import get_preset
    from tests.hub_server import Hub, serve

    names = {source.name for part, source in get_preset(preset).sources.items() if part != "speech"}
    with serve(Hub({name: folder / "published" / name for name in names})) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hub"), "MMCHAT_CACHE": str(folder / "cache")}
        command = [sys.executable, __file__, *arguments]
        if subprocess.run(command, env={**os.environ, **environment}).returncode:
            sys.exit(f"The stage {stage} failed.")


def run(stage: str, preset: str, published: Path, layers: int) -> None:
    start = time.perf_counter()
    if stage == "write":
        WRITERS[preset](published, layers)
    elif stage == "fetch":
        fetch_all(preset)
    else:
        use(stage, preset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kilobytes
    print(f"{stage}: {time.perf_counter() - start:.0f} s, peak memory {peak:.1f} GB", flush=True)


def write_llava_phi_3(published: Path, layers: int) -> None:
    """Random weights in the format of LlavaForConditionalGeneration, in several files."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Phi3Config

    from mmchat.presets import LLAVA_PHI_3

    folder, tokenizer = published / LLAVA_PHI_3.weights.name, make_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VIT_LARGE_336),
        text_config=Phi3Config(**{**PHI_3, "num_hidden_layers": layers}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    write_model(LlavaForConditionalGeneration, config, folder)
    LlavaProcessor(
        image_processor=image_processor(336),
        tokenizer=tokenizer,
        patch_size=VIT_LARGE_336["patch_size"],
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def write_phi_3_5(published: Path, layers: int) -> None:
    """Three repositories: the language model, CLIP ViT-B/32, and a published projector and adapter."""
    import torch
    from transformers import CLIPConfig, CLIPModel, Phi3Config, Phi3ForCausalLM

    from mmchat.presets import PHI_3_5

    folder = published / PHI_3_5.language_model.source.name
    config = Phi3Config(**{**PHI_3, **LONG_ROPE, "num_hidden_layers": layers})
    write_model(Phi3ForCausalLM, config, folder)
    make_tokenizer().save_pretrained(folder)
    folder = published / PHI_3_5.image_encoder.source.name
    write_model(CLIPModel, CLIPConfig(), folder)  # its defaults are ViT-B/32
    image_processor(224).save_pretrained(folder)
    folder = published / PHI_3_5.weights.name
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.randn(shape) * 0.02 for name, shape in PUBLISHED_PROJECTOR.items()}, folder / PROJECTOR)
    lora = {}
    for layer in (f"model.layers.{index}.{name}" for index in range(layers) for name in PUBLISHED_ADAPTER):
        inputs, outputs = PUBLISHED_ADAPTER[layer.split(".", 3)[3]]
        lora[f"{layer}.lora_A.weight"] = torch.randn(16, inputs) * 0.02  # [rank, in]
        lora[f"{layer}.lora_B.weight"] = torch.randn(outputs, 16) * 0.02  # [out, rank]
        lora[f"{layer}.scaling"] = {"default": 1.0}
    torch.save(lora, folder / LORA)


PROJECTOR, LORA = "image_projector.pth", "lora_weights.pt"
WRITERS = {"llava-phi-3": write_llava_phi_3, "phi-3.5": write_phi_3_5}


def write_model(model_class, config, folder: Path) -> None:
    """A model with random weights in bfloat16, in files of at most 2 GB."""
    import torch

    with torch.device("meta"):
        model = model_class(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name and name.endswith("weight") else weight.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size="2GB")


def image_processor(side: int):
    """CLIP's preprocessing."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def make_tokenizer():
    """A small tokenizer with Phi-3's special tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([QUESTION, ANSWER], vocab_size=400, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
    )


def fetch_all(name: str) -> None:
    """Fetches the preset's models and weights; published checkpoints are imported."""
    from mmchat.checkpoints.weights_folder import default_weights
    from mmchat.fetching import fetch
    from mmchat.presets import get_preset

    preset = get_preset(name)
    for source in (preset.language_model.source, preset.image_encoder.source):
        fetch(source)
    default_weights(preset)


def use(stage: str, name: str) -> None:
    """Loads the weights; then one answer about a picture, or one step of QLoRA."""
    import torch
    from PIL import Image

    from mmchat.checkpoints.weights_folder import default_weights, load_model, preset_for_weights
    from mmchat.conversation import Message, SamplingOptions
    from mmchat.inference.decoder import load_decoder
    from mmchat.inference.generation import stream_token_ids
    from mmchat.models.chat_formats import chat_format_of
    from mmchat.models.image_encoder import load_image_encoder
    from mmchat.models.prompt import tokenize_conversation
    from mmchat.presets import get_preset

    start = time.perf_counter()
    weights = default_weights(get_preset(name))
    preset, is_training = preset_for_weights(get_preset(name), weights), stage == "qlora"
    quantization = "none" if stage == "none" else "4bit"
    dtype = torch.bfloat16 if stage == "none" else torch.float32  # 4 bits are computed in 32 on a CPU, as in training
    model, tokenizer = load_model(preset, weights, dtype, quantization=quantization, trainable=is_training)
    encoder = load_image_encoder(preset.image_encoder)
    print(f"{stage}: loaded in {time.perf_counter() - start:.0f} s", flush=True)
    picture = Image.open(ROOT / "examples" / "camera.jpg").convert("RGB")
    features = encoder.encode([picture]).clone()  # [1, feature_count, image_dim]
    messages = [Message("user", QUESTION, [picture])]
    if is_training:
        messages.append(Message("assistant", ANSWER))
    encoded = tokenize_conversation(
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
    decoder = load_decoder(model.language_model)
    print(f"{stage}: {type(decoder).__name__} ready in {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    stream = stream_token_ids(decoder, prompt[None], SamplingOptions(temperature=0, max_new_tokens=8), set())
    next(stream)
    first = time.perf_counter() - start
    list(stream)
    seconds = time.perf_counter() - start
    print(f"{stage}: 8 tokens about {len(prompt)} in {seconds:.0f} s, the first after {first:.0f} s", flush=True)


def step(model, token_ids, is_answer, features, name: str) -> float:
    """One optimizer step of a LoRA adapter on 4-bit weights, a fresh one if there is none, and of the projector."""
    import torch

    from mmchat.models.language_model import add_adapter
    from mmchat.models.vision_language_model import IGNORE_INDEX
    from mmchat.training.loss import next_token_loss

    if not model.has_adapter:
        model.language_model = add_adapter(model.language_model, rank=16, alpha=32, dropout=0.0, base_name=name)
    model.unwrapped_language_model.gradient_checkpointing_enable({"use_reentrant": False})
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
