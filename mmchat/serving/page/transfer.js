// Export and import of a conversation, as JSON and as Markdown, with its pictures. A file may come from anybody:
// whatever is read is checked and rebuilt from what a conversation can hold.
mmchat.transfer = (() => {
  const VERSION = 1, MAX_FILE = 100e6, MAX_TURNS = 10_000, MAX_TEXT = 200_000, MAX_OPTION = 500_000, MAX_PICTURE = 10e6;
  const PICTURE = /^data:image\/(png|jpeg|webp|gif|bmp|tiff);base64,[A-Za-z0-9+/=]+$/;
  const HEADS = /^\\*(# |## |<!-- mmchat |!\[)/; // what opens a line with a meaning in our Markdown

  const toUrl = blob => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(blob);
  });
  const toBlob = url => {
    const [head, data] = url.split(',');
    return new Blob([Uint8Array.from(atob(data), letter => letter.charCodeAt(0))], {type: head.slice(5).split(';')[0]});
  };
  const download = (name, type, text) => {
    const url = URL.createObjectURL(new Blob([text], {type}));
    Object.assign(document.createElement('a'), {href: url, download: name}).click();
    URL.revokeObjectURL(url);
  };
  const comment = given => `<!-- mmchat ${JSON.stringify(given).replace(/>/g, '\\u003e')} -->`; // what only we read
  const uncommented = line => JSON.parse(line.slice(12, -4));
  const oneLine = text => text.replace(/\s+/g, ' ');
  const clean = (value, names) => Object.fromEntries(Object.entries(value ?? {}).filter(([name, given]) =>
    names.includes(name) && given !== null && given !== undefined));

  // The conversation without anything that belongs to this server: pictures as data URLs in place of paths.
  const collect = async history => {
    const chat = (await mmchat.store.list()).find(chat => chat.id === mmchat.store.idOf(history));
    const thumbs = mmchat.thumbs.of(history), turns = [];
    for (const [index, turn] of history.entries()) {
      const parts = [];
      for (const part of turn.content) {
        if (part.type === 'text') parts.push({text: part.text});
        if (part.type !== 'file') continue;
        const name = part.alt_text || 'Picture', kept = await mmchat.store.read('pictures', part.file.path);
        const answer = kept ? null : await fetch(part.file.url);
        if (kept || answer.ok) parts.push({picture: await toUrl(await mmchat.store.typed(kept ?? await answer.blob())), name});
        else parts.push({text: mmchat.store.gone(part)});
      }
      const metadata = clean(turn.metadata, ['title', 'log', 'duration', 'status']);
      turns.push({role: turn.role, parts, ...Object.keys(metadata).length && {metadata},
        ...turn.options?.length && {options: turn.options}, ...thumbs[index] && {thumb: thumbs[index]}});
    }
    return {format: 'mmchat', version: VERSION, title: chat?.title ?? 'Conversation', turns};
  };

  const toMarkdown = chat => {
    const title = oneLine(chat.title), lines = [`# ${title}`];
    if (title !== chat.title) lines.push(comment({title: chat.title}));
    lines.push('');
    for (const {role, parts, ...more} of chat.turns) {
      lines.push(`## ${role === 'user' ? 'User' : 'Assistant'}${more.metadata?.title ? ` (${oneLine(more.metadata.title).toLowerCase()})` : ''}`);
      if (Object.keys(more).length) lines.push(comment(more));
      for (const [index, part] of parts.entries()) {
        if (!part.picture && index && !parts[index - 1].picture) lines.push(comment({})); // between two texts
        if (part.picture) lines.push(`![${oneLine(part.name).replace(/[\\[\]]/g, '\\$&')}](${part.picture})`, '');
        else lines.push(...part.text.split('\n').map(line => HEADS.test(line) ? '\\' + line : line), '');
      }
    }
    return lines.join('\n') + '\n';
  };
  const fromMarkdown = text => {
    const chat = {format: 'mmchat', version: VERSION, title: '', turns: []};
    let turn = null, said = null;
    const flush = () => { // the blank line that ends a text is ours
      if (said && said.at(-1) === '') said.pop();
      if (said?.length) turn.parts.push({text: said.join('\n')});
      said = null;
    };
    for (const line of text.replace(/\n$/, '').split('\n')) {
      const head = /^## (User|Assistant)( \(.*\))?$/.exec(line), picture = /^!\[((?:\\.|[^\\\]])*)\]\((data:[^)]*)\)$/.exec(line);
      if (line.startsWith('# ') && !turn) chat.title = line.slice(2);
      else if (head) { flush(); turn = {role: head[1].toLowerCase(), parts: []}; chat.turns.push(turn); }
      else if (line.startsWith('<!-- mmchat ')) {
        if (turn) { flush(); Object.assign(turn, uncommented(line)); } else chat.title = uncommented(line).title;
      }
      else if (!turn) { if (line) throw new Error('text before the first turn'); }
      else if (picture) { flush(); turn.parts.push({picture: picture[2], name: picture[1].replace(/\\(.)/g, '$1')}); turn.afterPicture = true; }
      else if (turn.afterPicture && line === '') delete turn.afterPicture;
      else (said ??= []).push(HEADS.test(line) && line.startsWith('\\') ? line.slice(1) : line);
    }
    if (turn) flush();
    return chat;
  };

  const check = (isTrue, what) => { if (!isTrue) throw new Error(what); };
  const text = (value, most = MAX_TEXT) => { check(typeof value === 'string' && value.length <= most, 'text'); return value; };
  const build = given => {
    check(given?.format === 'mmchat' && given.version === VERSION, 'format');
    check(Array.isArray(given.turns) && given.turns.length && given.turns.length <= MAX_TURNS, 'turns');
    const blobs = [];
    const history = given.turns.map(turn => {
      check(['user', 'assistant'].includes(turn?.role) && Array.isArray(turn.parts) && turn.parts.length <= 50, 'turn');
      const content = turn.parts.map(part => {
        if (part.picture === undefined) return {type: 'text', text: text(part.text)};
        check(typeof part.picture === 'string' && part.picture.length < 1.4 * MAX_PICTURE && PICTURE.test(part.picture), 'picture');
        const path = `imported/${mmchat.store.newId()}`; // no file of the server; the copy is sent when it is opened
        blobs.push([path, toBlob(part.picture)]);
        return {type: 'file', file: {path, url: ''}, alt_text: text(part.name ?? 'Picture', 100)};
      });
      const metadata = {};
      for (const name of ['title', 'log', 'status'])
        if (turn.metadata?.[name] !== undefined) metadata[name] = text(turn.metadata[name], 500);
      if (turn.metadata?.duration !== undefined) { check(Number.isFinite(turn.metadata.duration), 'duration'); metadata.duration = turn.metadata.duration; }
      const options = (turn.options ?? []).map(option => ({label: text(option.label, 100), value: text(option.value, MAX_OPTION)}));
      return {role: turn.role, content, metadata, options};
    });
    const thumbs = mmchat.thumbs.from(history, given.turns.map(turn => turn.thumb));
    return {title: text(given.title ?? '', 1000).slice(0, 200) || 'Imported', history, blobs, thumbs};
  };

  const save = kind => async history => {
    if (!history.length) { mmchat.store.say('nothing_to_save'); return []; }
    const chat = await collect(history), name = chat.title.replace(/[^\p{L}\p{N} _-]/gu, '').trim().slice(0, 40) || 'conversation';
    if (kind === 'json') download(`${name}.json`, 'application/json', JSON.stringify(chat, null, 1));
    else download(`${name}.md`, 'text/markdown', toMarkdown(chat));
    return [];
  };
  const read = async file => { // returns the id of the new conversation
    check(file.size <= MAX_FILE, 'size');
    const content = await file.text();
    const chat = build(content.trimStart().startsWith('{') ? JSON.parse(content) : fromMarkdown(content));
    return mmchat.store.add(chat);
  };
  return {saveJson: save('json'), saveMarkdown: save('markdown'), read};
})();
