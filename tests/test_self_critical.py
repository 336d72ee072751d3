"""Self-critical training: what is sampled, what is rewarded, and that rewards rise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from mmchat.checkpoints.weights_folder import load_model
from mmchat.conversation import Message
from mmchat.errors import BadInput
from mmchat.models.chat_formats import CHAT_FORMATS
from mmchat.models.language_model import load_language_model
from mmchat.models.prompt import tokenize_conversation
from mmchat.presets import get_preset
from mmchat.training.data.llava_json import entry_of, write_conversations
from mmchat.training.data.packing import lay_out
from mmchat.training.run import train
from mmchat.training.self_critical import MIN_LIMIT, Reward, advantages, sample_answers, take_open_questions
from tests.test_trainer import assert_same, history, recipe

CAPTIONS = (
    ("A brown dog runs on the grass.", "A brown dog runs.", "The brown dog runs on grass."),
    ("Yes, there is a picture.", "What is in the picture?", "There is a picture in this."),
)


@pytest.fixture(scope="module")
def described(tiny, tmp_path_factory) -> Path:
    """Weights trained on three captions per picture, and the conversations they were trained on."""
    folder = tmp_path_factory.mktemp("described")
    entries = []
    for number in range(8):
        asked = [[("Describe the image.", caption)] for caption in CAPTIONS[number % 2]]
        asked += [[("Is there a dog?", "Yes." if number % 2 else "No.")]]
        entries += [entry_of(f"{number}-{index}", f"{number}.png", turns) for index, turns in enumerate(asked)]
    write_conversations(folder / "open.json", entries)
    train(recipe(tiny, folder / "weights", train=[str(folder / "open.json")], max_steps=40, save_steps=40))
    return folder


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny, described):
    return load_model(get_preset("phi3-patches"), described / "weights", torch.float32)


def encoded(tokenizer, *turns: tuple[str, str]):
    messages = [
        message
        for number, (question, answer) in enumerate(turns)
        for message in (Message("user", question, images=() if number else ("a.png",)), Message("assistant", answer))
    ]
    return tokenize_conversation(messages, tokenizer, CHAT_FORMATS["phi-3"], 4)


def test_a_question_with_three_answers_is_open_and_leaves_the_sequence(tiny):
    _, tokenizer = load_language_model(get_preset("phi3-patches").language_model, torch.float32)
    captions = [encoded(tokenizer, ("Describe the image.", caption)) for caption in CAPTIONS[0]]
    others = [
        encoded(tokenizer, ("Is there a dog?", "Yes.")),
        encoded(tokenizer, ("What is it?", "A dog.")),
        encoded(tokenizer, ("What is it?", "A brown dog.")),  # two different answers are not enough
    ]
    (row,) = lay_out([others[0], *captions, *others[1:]], 1000)
    stops = set(tokenizer.convert_tokens_to_ids(CHAT_FORMATS["phi-3"].stops))
    before = copy.deepcopy(row)
    remaining, (question,) = take_open_questions(row, stops)
    assert row == before  # the caller's sequence is unchanged
    assert sorted(tokenizer.batch_decode(question.answers)) == sorted(CAPTIONS[0])
    assert tokenizer.decode(question.token_ids[-3:]).endswith("<|assistant|>") and question.images == ["a.png"]
    (expected,) = lay_out(others, 1000)
    # The rest equals the other conversations packed alone, except that the open question's own tokens stay.
    assert len(remaining) == len(expected) + len(question.token_ids) - shared_with(others, question)
    assert sum(remaining.is_answer) == sum(expected.is_answer)
    for index, parent in enumerate(remaining.parent):
        assert parent < index < remaining.subtree_end[index] and (
            parent < 0 or remaining.subtree_end[parent] >= remaining.subtree_end[index]
        )


def shared_with(conversations, question) -> int:
    """How many of the question's first tokens the other conversations share."""

    def common(first, second):
        return next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), 0)

    return max(common(conversation.token_ids, question.token_ids) for conversation in conversations)


def test_an_answer_with_a_follow_up_question_stays_as_context(tiny):
    _, tokenizer = load_language_model(get_preset("phi3-patches").language_model, torch.float32)
    captions = [[("Describe the image.", caption)] for caption in CAPTIONS[0]]
    captions[1].append(("Is there a dog?", "Yes."))
    (row,) = lay_out([encoded(tokenizer, *turns) for turns in captions], 1000)
    remaining, (question,) = take_open_questions(row, set())
    text = tokenizer.decode([token_id for token_id in remaining.token_ids if token_id >= 0])
    assert CAPTIONS[0][1] in text and CAPTIONS[0][0] not in text
    labels = [token for token, is_answer in zip(remaining.token_ids, remaining.is_answer, strict=True) if is_answer]
    assert tokenizer.decode(labels).startswith("Yes.") and len(question.answers) == 3


def test_the_reward_equals_the_caption_metrics_and_is_lower_for_truncated_text():
    references = [["A dog runs on grass.", "The dog runs."], ["A cat sleeps.", "A gray cat sleeps on a bed."]] * 50
    reward = Reward(references)
    texts = ["A dog runs on grass.", "A dog runs on grass and a", "A cat.", "A gray cat sleeps."]
    wanted = [references[0], references[0], references[0], references[1]]
    scores = reward(texts, wanted).tolist()
    assert scores[0] > scores[1] > scores[2] and scores[3] > scores[2]
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    whole = CiderScorer()  # all pictures at once, as in evaluation
    for texts in references:
        whole += ("a cat sleeps .", [text.lower().replace(".", " .") for text in texts])
    alone = reward(["A cat sleeps."], [references[1]]).item()
    assert alone - 1 == pytest.approx(whole.compute_score()[1][1], abs=0.02)  # BLEU-4 is 1; 101 pictures stand for 100


def test_descriptions_are_rewarded_for_the_name_of_a_thing_and_not_for_invented_people():
    captions, names = ["A man drinks coffee.", "Coffee.", "He drinks."], ["espresso", "espressos", "cup of coffee"]
    reward = Reward([captions, names, ["A red cup.", "A cup."]])
    assert reward(
        ["A cup of coffee.", "A table.", "A woman with a cup of coffee.", "Espressomaker."], [names] * 4
    ).tolist() == [
        1.0,
        0.0,
        0.5,
        0.0,
    ]
    honest, invented = reward(["A red cup.", "A man, a red cup."], [["A red cup.", "A cup."]] * 2).tolist()
    assert invented < honest - 0.5
    assert reward(["A man drinks coffee."], [captions]).item() > 1  # he is there


def test_the_baseline_is_the_mean_reward_of_the_other_samples():
    assert advantages(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [[-3.0, -1.5, 4.5]]


def test_samples_follow_the_model_distribution(tiny, model_and_tokenizer):
    from mmchat.training.data.features import FeatureStore
    from mmchat.training.self_critical import OpenQuestion

    model, tokenizer = model_and_tokenizer
    features = FeatureStore(tiny / "features-patches")
    prompts = []
    for words in ("Describe the image.", "What is in this picture? Describe the image."):  # two lengths
        message = [Message("user", words, images=("0.png",))]
        prompts.append(tokenize_conversation(message, tokenizer, CHAT_FORMATS["phi-3"], 4, add_generation_prompt=True))
    questions = [OpenQuestion(prompt.token_ids, [[1, 1]], prompt.images) for prompt in prompts]
    shown = torch.stack([features["0.png"]] * 2).float()
    torch.manual_seed(0)
    sampled = sample_answers(model, questions, shown, 3000)
    for prompt, answers, picture in zip(prompts, sampled, shown, strict=True):
        embeddings = model.splice(torch.tensor([prompt.token_ids]), picture[None])
        expected = model.language_model(inputs_embeds=embeddings).logits[0, -1].softmax(dim=-1)
        counted = torch.bincount(torch.tensor([answer[0] for answer in answers]), minlength=len(expected)) / 3000
        assert (counted - expected).abs().max() < 0.04 and expected.max() > 0.05
        assert max(len(answer) for answer in answers) <= MIN_LIMIT  # the human answers are shorter


@pytest.mark.slow
def test_rewards_rise_and_a_run_resumes_exactly(tiny, described, tmp_path):
    settings = {
        "train": [str(described / "open.json")],
        "start_from": str(described / "weights" / "checkpoint-40"),
        "scst_samples": 6,
        "lr": 2e-3,
        "projector_lr": 2e-3,
        "lr_scheduler_type": "constant",  # so that a run of 20 steps begins as one of 40 does
        "save_steps": 20,
    }
    train(recipe(tiny, tmp_path / "whole", max_steps=40, **settings))
    rewards = [float(line["reward"]) for line in history(tmp_path / "whole") if line["reward"]]
    assert len(rewards) == 40 and sum(rewards[-8:]) > 1.15 * sum(rewards[:8])
    train(recipe(tiny, tmp_path / "cut", max_steps=20, **settings))
    train(recipe(tiny, tmp_path / "cut", max_steps=40, resume=True, **settings))
    assert_same(tmp_path / "cut" / "checkpoint-40", tmp_path / "whole" / "checkpoint-40")


@pytest.mark.slow
def test_worker_processes_prepare_the_same_batches(tiny, described, tmp_path):
    settings = {"train": [str(described / "open.json")], "scst_samples": 3, "max_steps": 3}
    for workers in (0, 1):
        train(recipe(tiny, tmp_path / f"{workers}", workers=workers, **settings))
    assert_same(tmp_path / "0" / "checkpoint-3", tmp_path / "1" / "checkpoint-3")


@pytest.mark.slow
def test_scst_without_open_questions_is_refused(tiny, tmp_path):
    with pytest.raises(BadInput, match="No question has 3 different answers"):
        train(recipe(tiny, tmp_path, scst_samples=2))
    with pytest.raises(BadInput, match="use 2 or more"):
        recipe(tiny, tmp_path, scst_samples=1)
