"""Speech on the page: the Voice tab, answers read aloud, and talking hands-free."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import BadInput, MmchatError
from ...models.text_to_speech import BackgroundReader, SpokenSentence, wav_bytes
from ..uploads import is_uploaded, shown_error
from .assets import asset
from .history import Box, History, is_folded, parts_of, text_of, user_turn
from .turns import NO_REQUEST, Page, asked
from .visit import Visit

DETECT = ("Detect language", "")
clip_numbers = count()


@dataclass(frozen=True)
class VoiceTab:
    """The Voice tab and those of its components that events need."""

    tab: gr.Tab
    recording: gr.Audio
    send: gr.Button
    language: gr.Dropdown
    translate: gr.Checkbox
    check: gr.Checkbox  # show the transcript before it is sent
    aloud: gr.Checkbox  # read answers aloud
    note: gr.Markdown  # what was heard so far, and in which language
    talk: gr.Button
    speaker: gr.HTML  # plays clips, and hears hands-free talk; its value is the last clip as JSON
    clips: gr.HTML  # hands the speaker the clips of the answer that is being written, in the same way


def build_speaker() -> gr.HTML:
    """Places what plays sound and hears hands-free talk; outside the tabs, which exist only once they are opened."""
    script = asset("voice.js")
    return gr.HTML(visible="hidden", js_on_load=script, elem_id="speaker")


def build_clips() -> gr.HTML:
    """Places what receives the clips of the answer that is being written.

    Beside the speaker, where an answer without clips could overwrite those of another one that is read aloud.
    """
    return gr.HTML(visible="hidden", js_on_load="watch('value', () => mmchatVoice.hear(props.value))")


def build_voice_tab(speaker: gr.HTML, clips: gr.HTML) -> VoiceTab:
    """Places the microphone and its switches; the pictures of the Text tab go with the recording."""
    with gr.Tab("Voice", id="voice") as tab:
        recording = gr.Audio(
            type="filepath",
            sources=["microphone", "upload"],
            label="Speak your question",
            elem_id="mic",
            waveform_options=gr.WaveformOptions(sample_rate=16000),
            buttons=[],
        )
        with gr.Row(elem_id="voice-switches"):
            language = gr.Dropdown([DETECT], value="", label="Language", show_label=False, elem_id="language", scale=2)
            translate = gr.Checkbox(label="Translate into English", elem_id="translate")
            check = gr.Checkbox(value=True, label="Check before sending", elem_id="check")
            aloud = gr.Checkbox(label="Read answers aloud", elem_id="aloud")
        with gr.Row():
            send = gr.Button("Send recording", variant="primary", size="sm")
            talk = gr.Button("Talk hands-free", size="sm", elem_id="talk")
        note = gr.Markdown(" ", elem_id="heard", min_height=24)
        gr.HTML('<span id="talk-note" role="status"></span>')
    return VoiceTab(tab, recording, send, language, translate, check, aloud, note, talk, speaker, clips)


class VoicePage:
    """Event handlers of speech, beside those of ``Page``."""

    def __init__(self, page: Page):
        self.page = page

    def languages(self) -> Any:
        """The dropdown with the languages that the speech model hears."""
        return _dropdown(self._names(), DETECT[0])

    def open(self) -> None:
        """Loads the speech model while the visitor finds the microphone; if it fails, the recording's error says so."""
        with suppress(MmchatError):
            self.page.engine.load_speech()

    def add_voice(
        self,
        recording: str | None,
        box: Box,
        history: History,
        visit: Visit,
        language: str = "",
        translate: bool = False,
        check: bool = False,
        request: gr.Request | None = None,
        is_hands_free: bool = False,
    ) -> Iterator[tuple[Any, ...]]:
        """Transcribes a recording, into the box for checking or into the conversation as a question.

        Yields:
            recording, box, conversation, request id, note, and dropdown; while a long recording is heard, the note has
            what was heard so far.
        """
        if not recording:
            raise gr.Error("Please record or upload a question first.", print_exception=False)
        self.page.admit(request)
        request_id = visit.request(is_hands_free=is_hands_free)  # before the work: it ends a running reply
        nothing, shown = (gr.skip(), gr.skip(), gr.skip()), None
        try:
            task = "translate" if translate else "transcribe"
            with closing(self.page.engine.listen(recording, language or None, task)) as parts:
                for heard in parts:
                    if visit.is_over(request_id):
                        yield *nothing, NO_REQUEST, " ", gr.skip()
                        return
                    if heard.text and heard.progress < 1 and heard is not shown:
                        shown = heard
                        yield *nothing, gr.skip(), f"{heard.progress:.0%} heard: {heard.text}", gr.skip()
        except Exception as error:
            raise shown_error(error) from error
        note, names = self._note(heard.language, translate), self._names()
        name = names.get(heard.language, heard.language)
        dropdown = gr.skip() if language else _dropdown(names, f"Detected: {name}")
        seconds = sum(segment.end - segment.start for segment in heard.segments)
        if check:
            visit.unsent_speech += seconds
            text = " ".join(filter(None, [box["text"].strip(), heard.text]))
            yield None, {**box, "text": text}, gr.skip(), NO_REQUEST, note, dropdown
        else:
            visit.speech_seconds = seconds
            conversation = asked(history, user_turn(heard.text, box["files"]))
            yield None, {**box, "files": []}, conversation, request_id, note, dropdown

    def add_spoken(
        self,
        box: Box,
        history: History,
        visit: Visit,
        language: str,
        translate: bool,
        event: gr.EventData,
        request: gr.Request | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """Hands-free: sends an utterance at once."""
        path = Path(str(event.path)).resolve()
        if not is_uploaded(path):
            raise gr.Error("That recording was not uploaded here.", print_exception=False)
        for _, *shown in self.add_voice(str(path), box, history, visit, language, translate, False, request, True):
            yield tuple(shown)

    def reply(
        self, history: History, visit: Visit, request_id: int, *settings: Any
    ) -> Iterator[tuple[Any, str | None]]:
        """Streams the answer as ``Page.reply`` does and its sentences as clips if the last setting says so."""
        *settings_of_page, is_aloud = settings
        is_aloud = (is_aloud or visit.is_hands_free) and not visit.is_over(request_id)
        reader = BackgroundReader(self.page.engine.read_aloud) if is_aloud else None
        is_draft_spoken = not any(settings_of_page[2:3])  # a draft that is rewritten is not read aloud
        unchanged = gr.skip() if reader else None  # for a skipped output, gradio builds its component again: 4 ms
        clips, said, text = Clips(), "", ""
        try:
            with closing(self.page.reply(history, visit, request_id, *settings_of_page)) as shown:
                for conversation in shown:
                    yield conversation, unchanged
                    if not reader or not isinstance(conversation, list) or is_folded(conversation[-1]):
                        continue
                    text = text_of(conversation[-1])
                    if is_draft_spoken and text.startswith(said):
                        reader.feed(text[len(said) :])
                        said = text
                    yield from clips.of(reader.ready())
            if reader and not visit.is_over(request_id):
                reader.feed(text[len(said) :])
                reader.finish()
                for shown_clip in clips.of(reader.rest()):
                    if visit.is_over(request_id):
                        break
                    yield shown_clip
        except gr.Error:
            yield gr.skip(), clips.done()  # hands-free, listening goes on
            raise
        finally:
            if reader:
                reader.close()
        yield gr.skip(), clips.done()

    def speak(self, history: History, event: gr.EventData) -> Iterator[str]:
        """Reads one answer aloud; the browser names it by its number among the shown parts of answers."""
        shown = [turn for turn in history if turn.get("role") == "assistant" for _ in parts_of(turn)]
        if not isinstance(event.nth, int) or not 0 <= event.nth < len(shown) or is_folded(shown[event.nth]):
            raise gr.Error("There is no such answer.", print_exception=False)
        clips = Clips()
        try:
            for sentence in self.page.engine.read_aloud([text_of(shown[event.nth])]):
                yield clips.add(sentence)
        except Exception as error:
            raise shown_error(error) from error

    def _names(self) -> dict[str, str]:
        return dict(getattr(self.page.engine, "languages", {}))

    def _note(self, language: str, translate: bool) -> str:
        """What was heard; for a language that the answering model lacks, what to do."""
        name, answers_in = self._names().get(language, language), getattr(self.page.engine, "answers_in", ())
        if language in answers_in or not answers_in:
            return f"Heard {name}."
        if translate:
            return f"Heard {name}, translated into English."
        return f"Heard {name}, which the model that answers does not know: tick “Translate into English”."


def connect_voice(voice: VoicePage, parts: Any, quick: dict[str, Any]) -> None:
    """Connects the events of speech."""
    tab, box, chat, visit = parts.voice, parts.box, parts.chat, parts.visit
    heard = [box, chat, parts.request_id, tab.note, tab.language]
    tab.tab.select(voice.open, None, None, queue=False, **quick)
    send = tab.send.click(_listening, None, [parts.stop, tab.note], queue=False, **quick).then(
        voice.add_voice,
        [tab.recording, box, chat, visit, tab.language, tab.translate, tab.check],
        [tab.recording, *heard],
        concurrency_id="hearing",
        concurrency_limit=2,
        **quick,
    )
    send.failure(lambda: gr.Button(visible=False), None, parts.stop, queue=False, **quick)
    send.success(_heard, parts.request_id, parts.stop, queue=False, **quick)
    to_box = f"(check, id) => {{ if (check && id === {NO_REQUEST}) mmchat.openText(); return []; }}"
    send.success(None, [tab.check, parts.request_id], None, js=to_box, **quick)
    done = {"queue": False, **quick}
    spoken = tab.speaker.spoken(voice.add_spoken, [box, chat, visit, tab.language, tab.translate], heard, **quick)
    spoken.failure(lambda: Clips().done(), None, tab.speaker, **done)
    tab.speaker.speak(voice.speak, chat, tab.speaker, **quick)
    tab.speaker.blocked(lambda: gr.Info("The browser plays no sound before you click something on the page."), **done)
    tab.talk.click(None, None, None, js="() => { mmchatVoice.listen(); return []; }", **quick)
    gr.on(
        [parts.stop.click, parts.fresh.click, chat.undo, chat.retry, chat.clear],
        None,
        None,
        None,
        js="() => { mmchatVoice.hush(); return []; }",
        **quick,
    )
    switches = [tab.check, tab.aloud]
    write = "(...values) => mmchat.switches.write(values)"
    gr.on([switch.input for switch in switches], None, switches, None, js=write, **quick)


def _listening() -> tuple[Any, str]:
    return gr.Button(visible=True), "Listening to the recording …"


def _heard(request_id: int) -> Any:
    """Hides Stop, unless an answer follows."""
    return gr.Button(visible=False) if request_id == NO_REQUEST else gr.skip()


def _dropdown(names: dict[str, str], first: str) -> Any:
    return gr.Dropdown([(first, ""), *((name, code) for code, name in names.items())], value="")


class Clips:
    """The sentences of one answer as the browser plays them: JSON with WAV in base64.

    Values that follow each other fast may reach the browser as the last one only, so each repeats the last but one.
    """

    def __init__(self) -> None:
        self.turn, self._last = next(clip_numbers), []

    def add(self, sentence: SpokenSentence) -> str:
        """The value of the speaker that plays a sentence after those before it."""
        wav = base64.b64encode(wav_bytes(sentence.samples, sentence.rate)).decode()
        self._last = [*self._last[-1:], {"number": next(clip_numbers), "audio": wav}]
        return self._value()

    def of(self, spoken: Iterator[SpokenSentence]) -> Iterator[tuple[Any, str]]:
        """The outputs that play sentences. A language without a voice is named, and ends them, not the answer."""
        try:
            for sentence in spoken:
                yield gr.skip(), self.add(sentence)
        except BadInput as error:
            gr.Info(str(error))

    def done(self) -> str:
        """The value that says that nothing follows."""
        return self._value(done=True)

    def _value(self, done: bool = False) -> str:
        # A number of its own, since the browser does not notice equal values.
        return json.dumps({"turn": self.turn, "number": next(clip_numbers), "clips": self._last, "done": done})
