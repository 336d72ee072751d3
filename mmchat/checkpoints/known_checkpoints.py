"""Projects whose checkpoints can be imported: the prompt template of each, and the tensor names of its projector.

Tensors define the projector, but not the image encoder or the prompt template. Those come from each project's code.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..fetching.sources import HubRepository
from ..models.chat_formats import PromptTemplate


@dataclass(frozen=True)
class Project:
    """What a checkpoint does not say about itself."""

    chat_format: str  # of its language model, a key of chat_formats.CHAT_FORMATS
    prompt_template: PromptTemplate
    image_encoder: HubRepository | None = None  # None: the preset's
    image_features: str = "patches"
    image_layer: int = -1
    class_token: bool = False
    marker_token: str | None = None  # the word that ends every picture
    note: str = ""  # what to expect of its answers


PROJECTS = {
    # add_eos_token=True changes nothing here: its chat template writes the end of text behind <|end|> itself.
    "sayanbanerjee32": Project(
        chat_format="phi-3",
        prompt_template=PromptTemplate(
            picture_first=True,
            system="<|system|>\nYou are a helpful assistant.<|end|>\n",
            turn_start="<|user|>\n",
            before_question="Given the following information, provide a detailed and accurate response:\n",
            after_question="\n[An image is provided for this task.]\n",
            turn_end="<|end|>\n",
            answer_start="<|assistant|>\n",
            answer_end="<|end|>",
        ),
        image_features="pooled",
    ),
    "ChintanShahDS": Project(
        chat_format="phi-3",
        prompt_template=PromptTemplate(
            system="<|system|>\nYou are a helpful assistant good at answering questions based on the given context."
            "<|end|>\n",
            turn_start="<|user|>\n",
            before_question="\n",
            turn_end="<|end|>\n",
            answer_start="<|assistant|>\n",
            answer_end="<|end|>",
        ),
        image_features="pooled",
        note="Its labels were shifted twice: it learned to predict the token after the next one, and it never learned "
        "to end an answer with <|end|>. Expect broken sentences that stop at the length limit only.",
    ),
    # The picture, the word "comment", and the question with a token of its own behind a space.
    "vandana1302238": Project(
        chat_format="phi-2",
        prompt_template=PromptTemplate(turn_end=" [QA]", answer_end="<|endoftext|>", added_tokens=("[QA]",)),
        marker_token="comment",
    ),
    # Its training scripts drop the class token; its last notebook and its inference keep it.
    # In training, the space before an answer belongs to its first word; its own inference ends the prompt with one.
    "walnashgit": Project(
        chat_format="phi-2",
        prompt_template=PromptTemplate(
            before_question="\nHuman### ", after_question="\nAI### ", answer_end="<|endoftext|>", picture_first=True
        ),
        image_layer=-4,
        class_token=True,
    ),
    "vasujoshi111": Project(
        chat_format="phi-2",
        prompt_template=PromptTemplate(turn_start="<iQ>", turn_end="</iQ>", answer_end="<|endoftext|>"),
        image_encoder=HubRepository("openai/clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3"),
    ),
    # Its conversations keep the <image> of LLaVA-Instruct as text.
    "RInkalshah93": Project(
        chat_format="phi-3",
        prompt_template=PromptTemplate(
            picture_first=True,
            turn_start="<|user|>",
            before_question="<image>\n",
            turn_end="<|end|>",
            answer_start="<|assistant|>",
            answer_end="<|end|>",
        ),
        image_features="pooled",
        note="It was trained on Phi-3-mini-4k-instruct, whose layers have the shapes of Phi-3.5's but other weights. "
        "Its labels were shifted twice: it learned to predict the token after the next one. Expect broken sentences.",
    ),
}
PROJECTS["ibrahim737701"] = PROJECTS["vandana1302238"]  # the same code on the same data, with other layers adapted
AUTO, NO_PROJECT = "auto", "none"  # recognized by the names of the tensors; the chat format's own prompt template
PROJECT_NAMES = (AUTO, NO_PROJECT, *PROJECTS)


@dataclass(frozen=True)
class StoredProjector:
    """A projector as others stored it."""

    kind: str  # of ProjectorConfig
    project: str  # whose it is, a key of PROJECTS
    names: dict[str, str]  # tensor-name prefixes: theirs -> ours
    first: str  # our name of the matrix that reads features
    hidden: str | None  # our name of the matrix whose number of rows is the intermediate size
    last: str  # our name of the matrix that outputs tokens


STORED_PROJECTORS = (
    StoredProjector(
        kind="mlp",
        project="ChintanShahDS",
        names={"pre_norm.": "pre_norm.", "proj.0.": "proj.0.", "proj.2.": "proj.2."},
        first="proj.0.weight",
        hidden="proj.0.weight",
        last="proj.2.weight",
    ),
    StoredProjector(
        kind="llava",
        project="sayanbanerjee32",
        names={"layer1.": "linear_1.", "layer2.": "linear_2."},
        first="linear_1.weight",
        hidden="linear_1.weight",
        last="linear_2.weight",
    ),
    StoredProjector(
        kind="normblocks",
        project="vandana1302238",
        names={
            "weight": "linear.weight",
            "bias": "linear.bias",
            "pre_norm.": "norm.",
            "proj.": "blocks.0.",
        },
        first="linear.weight",
        hidden="blocks.0.0.weight",
        last="linear.weight",
    ),
    StoredProjector(
        kind="normblocks",
        project="RInkalshah93",
        names={"output.": "linear.", "norm.": "norm.", "projection_layers.": "blocks."},
        first="linear.weight",
        hidden="blocks.0.0.weight",
        last="linear.weight",
    ),
    StoredProjector(
        kind="linear", project="walnashgit", names={"linear.": ""}, first="weight", hidden=None, last="weight"
    ),
    StoredProjector(
        kind="linear",
        project="vasujoshi111",
        names={"weight": "weight", "bias": "bias"},
        first="weight",
        hidden=None,
        last="weight",
    ),
)
