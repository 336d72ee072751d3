// Runs inside gradio's component: `element`, `props`, `trigger`, `watch` and `upload` are given.
// Out: WAV clips of one answer after the other, in order. In: hands-free talk, cut into utterances at silence.
const RATE = 16000;
const QUIET = 0.9;  // seconds of silence that end an utterance
const LEAST = 0.3;  // seconds of speech in an utterance
const LONGEST = 60;  // seconds of an utterance

// Out. One audio element: some browsers allow sound only for the one that a click started.
const player = new Audio();
let turn = null, muted = null, seen = -1, clips = [], playing = false;
const LAST = -1;  // an answer that is read while it is written
let asked = null, reading = null;  // which answer is to be read, and which is: places among the answers
const next = () => {
  const clip = clips.shift();
  playing = Boolean(clip);
  if (!clip) return;
  player.src = 'data:audio/wav;base64,' + clip;
  player.play().catch(error => { clips = []; playing = false; if (error.name === 'NotAllowedError') trigger('blocked'); });
};
player.onended = next;
const hush = () => { muted = turn; clips = []; playing = false; player.pause(); };
const hear = value => {
  if (!value) return;
  const said = JSON.parse(value);
  if (said.turn !== turn) { hush(); turn = said.turn; muted = null; reading = asked ?? LAST; asked = null; }
  if (said.done) waiting = false;
  for (const {number, audio} of said.clips) {
    if (number <= seen || said.turn === muted) continue;
    seen = number;
    window.mmchatVoice.played += 1;
    clips.push(audio);
    if (!playing) next();
  }
};
watch('value', () => hear(props.value));

// A speaker button below each answer; pressed again, it stops.
const place = () => document.querySelectorAll('#chat .bot-row + .message-buttons .icon-button-wrapper').forEach(bar => {
  if (bar.querySelector('.mm-speak')) return;
  const row = bar.closest('.message-buttons').previousElementSibling;
  const rows = () => [...document.querySelectorAll('#chat .bot-row')];
  bar.append(Object.assign(document.createElement('button'), {
    className: 'mm-speak icon-button', textContent: '♪', title: 'Read aloud', ariaLabel: 'Read aloud',
    onclick: () => {
      const at = rows().indexOf(row), isRead = playing && (reading === at || (reading === LAST && row === rows().at(-1)));
      hush();
      if (!isRead) { asked = at; trigger('speak', {nth: at}); }
    },
  }));
});
new MutationObserver(place).observe(document.body, {childList: true, subtree: true});
place();

// In.
const worklet = `registerProcessor('tap', class extends AudioWorkletProcessor {
  process(inputs) { if (inputs[0][0]) this.port.postMessage(inputs[0][0].slice()); return true; } })`;
const toWav = parts => {
  const length = parts.reduce((sum, part) => sum + part.length, 0), view = new DataView(new ArrayBuffer(44 + 2 * length));
  const text = (at, word) => [...word].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, 'RIFF'); view.setUint32(4, 36 + 2 * length, true); text(8, 'WAVEfmt '); view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); view.setUint16(22, 1, true); view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, 'data'); view.setUint32(40, 2 * length, true);
  let at = 44;
  for (const part of parts) for (const x of part) {
    view.setInt16(at, Math.max(-1, Math.min(1, x)) * 32767, true);
    at += 2;
  }
  return new Blob([view], {type: 'audio/wav'});
};
const NO_MICROPHONE = 'The browser gives no microphone: allow it for this page. Over a network, the page needs https.';
let context = null, media = null, waiting = false;
const button = () => document.querySelector('#talk button, button#talk');
const tell = text => { const note = document.querySelector('#talk-note'); if (note) note.textContent = text; };
const show = () => { const b = button(); if (b) b.textContent = context ? 'Stop talking' : 'Talk hands-free'; };
const halt = () => {
  media?.getTracks().forEach(track => track.stop());
  context?.close();
  context = media = null;
  waiting = false;
  hush(); show(); tell('');
};
const listen = async () => {
  if (context) return halt();
  let tap;
  try {
    media = await navigator.mediaDevices.getUserMedia({audio: {echoCancellation: true, noiseSuppression: true}});
    context = new AudioContext({sampleRate: RATE});
    await context.audioWorklet.addModule(URL.createObjectURL(new Blob([worklet], {type: 'text/javascript'})));
    tap = new AudioWorkletNode(context, 'tap');
    context.createMediaStreamSource(media).connect(tap);
  } catch (error) {
    console.debug('microphone', error);
    halt();
    return tell(NO_MICROPHONE);
  }
  let floor = 0.01, parts = [], before = [], talking = false, said = 0, quiet = 0, whole = 0;
  show(); tell('Listening …');
  tap.port.onmessage = async ({data}) => {
    if (!context) return;
    if (playing || waiting) { parts = []; before = []; talking = false; return; }  // do not hear the answer
    const level = Math.sqrt(data.reduce((sum, x) => sum + x * x, 0) / data.length), seconds = data.length / RATE;
    const loud = level > Math.max(0.012, 3 * floor);
    if (!loud) floor = 0.98 * floor + 0.02 * level;
    if (!talking) {
      before.push(data);
      if (before.length > 60) before.shift();
      if (loud) { talking = true; parts = before; before = []; said = quiet = whole = 0; }
      return;
    }
    parts.push(data);
    whole += seconds;
    if (loud) { said += seconds; quiet = 0; } else quiet += seconds;
    if (quiet < QUIET && whole < LONGEST) return;
    talking = false;
    if (said < LEAST) return;
    waiting = true;
    tell('Answering …');
    try {
      const {path} = await upload(new File([toWav(parts)], 'speech.wav', {type: 'audio/wav'}));
      trigger('spoken', {path});
    } catch (error) {
      waiting = false;  // what was said is lost; listening goes on
      console.debug('upload', error);
    }
  };
};
document.addEventListener('click', async event => {  // the recorder itself fails without a word
  if (!event.target.closest?.('#mic .record-button')) return;
  try { (await navigator.mediaDevices.getUserMedia({audio: true})).getTracks().forEach(track => track.stop()); }
  catch (error) { console.debug('microphone', error); tell(NO_MICROPHONE); }
});
setInterval(() => { if (context && !playing && !waiting) tell('Listening …'); }, 300);
window.mmchatVoice = {hear, hush, halt, listen, played: 0, speaking: () => playing, hearing: () => Boolean(context)};
