"""The commands mmchat ask, batch and classes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mmchat import AssetError
from mmchat import __main__ as terminal
from mmchat.serving import bulk
from tests.conftest import ROOT, SPEECH

NO_SUCH_LANGUAGE = "There is no language 'Klingon' in Whisper. Name one such as English, German or ja."


@pytest.fixture(autouse=True)
def loaded_engine(engine, monkeypatch):
    """The real engine, loaded once for all tests."""
    monkeypatch.setattr("mmchat.engine.load", lambda preset, weights, quantization, speech: engine)


def run(*arguments) -> int:
    return terminal.main([str(argument) for argument in arguments])


def test_help_does_not_wait_for_torch():
    script = (
        "import sys, mmchat.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "ask" in shown and "batch" in shown and shown.endswith("False\n")


@pytest.mark.slow
def test_ask_as_a_command():
    """In a subprocess: stdout holds the answer and nothing else."""
    command = [sys.executable, "-m", "mmchat", "ask", "Name the capital of France.", "--temperature", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "The capital of France is Paris.\n"
    assert "Traceback" not in result.stderr


def test_ask_about_a_picture(photo, capsys):
    assert run("ask", "--image", photo, "--temperature", 0, "--max-new-tokens", 20) == 0
    assert capsys.readouterr().out.strip()


def test_classes_lists_the_tags(photo, capsys):
    assert run("classes", photo.with_name("coffee.jpg")) == 0
    shown = capsys.readouterr().out
    assert "coffee.jpg: espresso " in shown and shown.rstrip().endswith("%")


def test_a_draft_is_rewritten(engine, capsys, tmp_path):
    assert run("ask", "Name the capital of France.", "--rewrite", "--temperature", 0, "--max-new-tokens", 20) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("Draft: The capital of France is Paris.") and captured.out.strip()
    (tmp_path / "q.jsonl").write_text('{"image": null, "question": "Name the capital of France."}\n')
    batch = ["batch", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl", "--rewrite", "--temperature", 0]
    assert run(*batch, "--max-new-tokens", 20) == 0
    line = json.loads((tmp_path / "a.jsonl").read_text())
    assert line["draft"] == "The capital of France is Paris." and line["answer"] == captured.out.strip()


@pytest.mark.slow
def test_a_spoken_question_is_transcribed_and_answered(capsys):
    assert run("ask", "--audio", SPEECH, "--max-new-tokens", 8) == 0
    captured = capsys.readouterr()
    assert "ask not what your country can do for you" in captured.err
    assert captured.out.strip()


def test_a_question_in_another_language_is_translated(engine, capsys, monkeypatch):
    recording = SPEECH.with_name("de.flac")
    assert run("ask", "--audio", recording, "--max-new-tokens", 4) == 0
    captured = capsys.readouterr()
    assert "vor dem alten Haus" in captured.err and "does not speak German: add --translate" in captured.err
    assert run("ask", "--audio", recording, "--language", "German", "--translate", "--max-new-tokens", 4) == 0
    captured = capsys.readouterr()
    assert "old house" in captured.err and "does not speak" not in captured.err
    monkeypatch.setattr(engine, "answers_in", ())  # not known
    assert run("ask", "--audio", recording, "--max-new-tokens", 4) == 0
    assert "does not speak" not in capsys.readouterr().err


def test_the_answer_is_written_to_a_file_as_speech(engine, tmp_path, capsys):
    assert run("ask", "Name the capital of France.", "--temperature", 0, "--speak", tmp_path / "out.wav") == 0
    assert "Paris" in capsys.readouterr().out
    assert "paris" in engine.transcribe(tmp_path / "out.wav", "en").text.lower()
    assert run("ask", "Hi", "--max-new-tokens", 4, "--speak", tmp_path / "no" / "out.wav") == 1
    assert "out.wav cannot be written: No such file or directory." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["ask", "--audio", SPEECH, "--language", "Klingon"],
            NO_SUCH_LANGUAGE,
        ),
        (["ask"], "Please type or speak a question."),
        (["ask", "What?", "--image", "nowhere.jpg"], "There is no picture 'nowhere.jpg'."),
        (["ask", "--audio", "nowhere.wav"], "There is no recording 'nowhere.wav'."),
        (["ask", "Hi", "--temperature", "9"], "The temperature must be between 0 and 5."),
    ],
)
def test_errors_are_one_sentence(capsys, arguments, says):
    assert run(*arguments) == 1
    assert capsys.readouterr().err.strip() == says


class TestBatch:
    @pytest.fixture
    def questions(self, tmp_path, photo):
        lines = [
            {"image": None, "question": "Name the capital of France."},
            {"image": str(photo), "question": "Describe the image.", "id": 7},
            {"image": "nowhere.jpg", "question": "What is it?"},
            {"image": None, "question": "Is water wet? Answer yes or no."},
        ]
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines) + "\nnot json\n")
        return path

    @staticmethod
    def batch(questions, out):
        return run("batch", questions, "--out", out, "--temperature", 0, "--max-new-tokens", 12)

    @staticmethod
    def answers(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_answers_are_in_order_and_bad_lines_are_skipped_with_a_message(self, questions, tmp_path, capsys):
        out = tmp_path / "answers.jsonl"
        assert self.batch(questions, out) == 0
        answers = self.answers(out)
        assert len(answers) == 5
        assert "Paris" in answers[0]["answer"] and answers[1]["answer"] and answers[3]["answer"]
        assert answers[1]["id"] == 7 and answers[1]["question"] == "Describe the image."
        assert answers[2]["answer"] is None and answers[4]["answer"] is None
        shown = capsys.readouterr().err
        assert "Line 3 skipped: There is no picture 'nowhere.jpg'." in shown and "Line 5 skipped" in shown
        assert "5/5" in shown  # the progress bar

    def test_an_interrupted_run_resumes_where_it_stopped(self, questions, tmp_path, monkeypatch):
        whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
        self.batch(questions, whole)
        first, second, *_ = whole.read_text().splitlines(keepends=True)
        out.write_text(first + second[:9])  # killed in the middle of writing line 2
        asked, read_line = [], bulk.read_line
        monkeypatch.setattr(bulk, "read_line", lambda line: (asked.append(line), read_line(line))[1])
        self.batch(questions, out)
        assert out.read_text() == whole.read_text()
        assert len(asked) == 4 and "Describe" in asked[0]

    @pytest.mark.parametrize("lines", [1, 9])
    def test_answers_to_other_questions_are_rejected(self, questions, tmp_path, capsys, lines):
        out = tmp_path / "answers.jsonl"
        out.write_text('{"image": null, "question": "Another?", "answer": "x"}\n' * lines)
        assert self.batch(questions, out) == 1
        assert "answers other questions" in capsys.readouterr().err and out.read_text().count("\n") == lines

    def test_a_folder_is_no_file_of_answers(self, questions, tmp_path, capsys):
        assert self.batch(questions, tmp_path) == 1
        assert "cannot be read: Is a directory." in capsys.readouterr().err

    def test_missing_weights_end_the_run_and_keep_the_answers(self, questions, tmp_path, monkeypatch, engine):
        def missing(*_):
            raise AssetError("The image encoder is missing.")

        monkeypatch.setattr(engine, "reply", missing)
        out = tmp_path / "answers.jsonl"
        assert self.batch(questions, out) == 1
        assert out.read_text() == ""

    def test_unusual_characters_and_blank_lines_do_not_shift_lines(self, tmp_path, capsys):
        path, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
        path.write_text('\ufeff{"image": null, "question": "One\u2028two?"}\n\nnot json\n', encoding="utf-8")
        self.batch(path, out)
        assert "Line 3 skipped" in capsys.readouterr().err
        assert len([json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]) == 2
        assert self.batch(path, out) == 0  # nothing left to do

    def test_a_finished_file_is_left_alone(self, questions, tmp_path, capsys):
        out = tmp_path / "answers.jsonl"
        self.batch(questions, out)
        before = out.read_text()
        assert self.batch(questions, out) == 0
        assert "already" in capsys.readouterr().err and out.read_text() == before

    def test_an_unwritable_file_is_named(self, questions, tmp_path, capsys):
        assert self.batch(questions, tmp_path / "nowhere" / "answers.jsonl") == 1
        assert "cannot be written" in capsys.readouterr().err


def test_app_py_is_mmchat_serve():
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    app, serve = (
        subprocess.run([sys.executable, *command, "--help"], **options).stdout
        for command in (["app.py"], ["-m", "mmchat", "serve"])
    )
    assert app == serve and "--rate-limit" in app


def test_every_command_that_needs_models_takes_the_same_flags():
    for command in (["serve"], ["ask", "Hi"], ["batch", "q.jsonl", "--out", "a.jsonl"], ["classes", "a.jpg"]):
        options = terminal.parse([*command, "--preset", "smol", "--weights", "w", "--quantization", "none"])
        assert (options.preset, options.weights, options.quantization) == ("smol", "w", "none")
