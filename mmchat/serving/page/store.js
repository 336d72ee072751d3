// Conversations in the visitor's own browser: IndexedDB, with a small copy of every picture. Nothing is kept on the
// server. A conversation's id is in its first message, so a late save can never write into another conversation.
mmchat.store = (() => {
  const SIDE = 1024, SMALL = 300_000; // pixels, bytes: larger pictures are kept as a JPEG of this side
  const OPEN = 'mmchat-open'; // in sessionStorage: the conversation that a reload goes on with
  let upload = null, notice = () => {}, ready;
  const isReady = new Promise(resolve => { ready = resolve; });

  const database = () => new Promise((resolve, reject) => {
    const request = indexedDB.open('mmchat', 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore('chats', {keyPath: 'id'});
      request.result.createObjectStore('pictures');
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  const run = async (store, mode, action) => {
    const opened = await database();
    return new Promise((resolve, reject) => {
      const transaction = opened.transaction(store, mode), request = action(transaction.objectStore(store));
      transaction.oncomplete = () => { opened.close(); resolve(request?.result); };
      transaction.onabort = () => { opened.close(); reject(transaction.error); };
    });
  };
  const read = (store, key) => run(store, 'readonly', all => all.get(key));
  const write = (store, value, key) => run(store, 'readwrite', all => key === undefined ? all.put(value) : all.put(value, key));
  const say = async reason => { await isReady; notice(reason); };
  const changed = () => dispatchEvent(new Event('mmchat-list'));

  const files = history => history.flatMap(turn => turn.content).filter(part => part.type === 'file').map(part => part.file);
  const textOf = turn => turn.content.filter(part => part.type === 'text').map(part => part.text).join('\n');
  const idOf = history => history[0]?.metadata?.id;
  const newId = () => [Date.now(), Math.random().toString(36).slice(2)].join('-');

  const HEADS = {jpeg: /^\xff\xd8\xff/, png: /^\x89PNG/, gif: /^GIF8/, bmp: /^BM/, tiff: /^(II[*+]|MM\0[*+])/, webp: /^RIFF.{4}WEBP/s};
  const typed = async blob => { // with the type of what is in it: the server names only some
    const head = String.fromCharCode(...new Uint8Array(await blob.slice(0, 12).arrayBuffer()));
    const kind = Object.keys(HEADS).find(name => HEADS[name].test(head));
    return kind ? blob.slice(0, blob.size, `image/${kind}`) : blob;
  };
  const shrink = async blob => {
    if (blob.size <= SMALL) return blob;
    const picture = await createImageBitmap(blob), scale = Math.min(1, SIDE / Math.max(picture.width, picture.height));
    const canvas = Object.assign(document.createElement('canvas'),
      {width: Math.round(picture.width * scale), height: Math.round(picture.height * scale)});
    const paper = canvas.getContext('2d');
    paper.fillStyle = 'white'; // behind what is transparent
    paper.fillRect(0, 0, canvas.width, canvas.height);
    paper.drawImage(picture, 0, 0, canvas.width, canvas.height);
    return new Promise(resolve => canvas.toBlob(resolve, 'image/jpeg', 0.9));
  };
  const dropped = new Set(); // paths of pictures, ids of conversations, or 'all'; each is told once, not with each save
  const drop = (key, reason, error) => {
    console.debug(reason, error);
    if (!dropped.has(key)) say(reason);
    dropped.add(key);
  };
  const keepPicture = async (path, url) => {
    if (dropped.has(path) || await read('pictures', path)) return;
    try {
      const answer = await fetch(url); // not ok: it is gone already, which the next question tells
      if (answer.ok) await write('pictures', await shrink(await typed(await answer.blob())), path);
    } catch (error) { drop(path, 'not_kept', error); }
  };
  const keepChat = async chat => {
    try { await write('chats', chat); dropped.delete(chat.id); } catch (error) { drop(chat.id, 'full', error); }
  };

  let emptied = null; // id of a conversation in the list that the next one takes the place of
  const write_chat = async history => {
    for (const {path, url} of files(history)) await keepPicture(path, url);
    const id = idOf(history), old = await read('chats', id);
    if (old && JSON.stringify(old.history) === JSON.stringify(history)) return;
    const first = history.find(turn => turn.role === 'user');
    const title = old?.title ?? ((first && textOf(first).trim().slice(0, 60)) || 'Picture');
    await keepChat({...old, id, title, time: Date.now(), history, thumbs: thumbs(id)});
    if (emptied && emptied !== id && !dropped.has(id)) {
      await run('chats', 'readwrite', all => all.delete(emptied));
      emptied = null;
    }
    changed();
  };
  const lit = {}; // id of a conversation -> its thumbs, as thumbs.js names them
  const thumbs = id => lit[id] ??= {};
  const rate = (id, answer, name) => {
    thumbs(id)[answer] = name;
    saving = saving.then(async () => {
      const chat = await read('chats', id);
      if (chat) await write('chats', {...chat, thumbs: thumbs(id)});
    }).catch(error => console.debug('thumb', error));
  };
  let saving = Promise.resolve(); // one save after the other
  let coming = null; // id of a conversation that is opened but not yet in view; the one in view may still be saved
  const arrived = history => { coming = null; return history; };
  const save = (history, isOpen = true) => {
    if (history?.length && idOf(history)) {
      const copy = structuredClone(history);
      if (isOpen && [null, idOf(history)].includes(coming)) sessionStorage.setItem(OPEN, idOf(history));
      saving = saving.then(() => write_chat(copy)).catch(error => drop('all', 'nothing_kept', error));
    }
    return [];
  };

  const gone = part => `(${part.alt_text || 'Picture'} is gone.)`;

  // Pictures that the server has deleted are sent again from the copy.
  const isThere = async file => {
    try { return file.url && (await fetch(file.url, {method: 'HEAD', cache: 'no-store'})).ok; }
    catch (error) { console.debug('look', error); return false; }
  };
  const sendAgain = async (part, blob) => {
    await isReady;
    const name = 'picture.' + blob.type.split('/')[1].replace('jpeg', 'jpg');
    const sent = await upload(new File([blob], name, {type: blob.type}));
    part.file = {path: sent.path, url: sent.url, orig_name: name, mime_type: blob.type, meta: {_type: 'gradio.FileData'}};
    try { await write('pictures', blob, sent.path); } catch (error) { drop(sent.path, 'not_kept', error); }
  };
  const restore = async history => {
    let isChanged = false, isUnsent = false;
    for (const turn of history) {
      const lost = [];
      for (const part of turn.content.filter(part => part.type === 'file')) {
        if (await isThere(part.file)) continue;
        const blob = await read('pictures', part.file.path);
        if (!blob) { lost.push(part); continue; }
        try { await sendAgain(part, blob); isChanged = true; }
        catch (error) { console.debug('send again', error); isUnsent = true; } // the copy stays, for the next time
      }
      if (lost.length) {
        isChanged = true;
        say('lost');
        turn.content = turn.content.map(part => lost.includes(part) ? {type: 'text', text: gone(part)} : part);
      }
    }
    if (isUnsent) say('not_sent');
    return isChanged;
  };
  const revive = async history => {
    try {
      const copy = structuredClone(history);
      return await restore(copy) ? copy : history;
    } catch (error) { console.debug('revive', error); return history; }
  };
  const reviveFirst = async ([history, ...rest]) => [await revive(history), ...rest]; // of an event's inputs
  const open = async id => {
    await saving;
    const chat = await read('chats', id);
    if (!chat) return [];
    emptied = null;
    lit[id] ??= chat.thumbs;
    sessionStorage.setItem(OPEN, id);
    coming = id;
    if (await restore(chat.history)) await keepChat(chat);
    changed();
    return chat.history;
  };
  let left = null;
  const fresh = () => { // empties the question box, the recording and the conversation
    left = sessionStorage.getItem(OPEN);
    emptied = coming = null;
    sessionStorage.removeItem(OPEN);
    changed();
    return [{text: '', files: []}, null, []];
  };
  const settle = history => [history?.length && idOf(history) === left ? [] : history]; // an answer's late piece
  const reopen = async () => { // after a reload
    const id = sessionStorage.getItem(OPEN);
    try { return [id ? arrived(await open(id)) : []]; } catch (error) { console.debug('reload', error); return [[]]; }
  };

  const list = async () => (await run('chats', 'readonly', all => all.getAll())).sort((a, b) => b.time - a.time);
  const rename = async (id, title) => { await keepChat({...await read('chats', id), title}); changed(); };
  const remove = async id => {
    await saving;
    await run('chats', 'readwrite', all => all.delete(id));
    const used = new Set((await list()).flatMap(chat => files(chat.history)).map(file => file.path));
    for (const key of await run('pictures', 'readonly', all => all.getAllKeys()))
      if (!used.has(key)) await run('pictures', 'readwrite', all => all.delete(key));
    if (sessionStorage.getItem(OPEN) === id) fresh(); else changed();
  };
  const undone = history => { // a conversation whose only question was undone stays, until that is asked another way
    if (history.length) return save(history);
    emptied = sessionStorage.getItem(OPEN);
    sessionStorage.removeItem(OPEN);
    changed();
    return [];
  };
  const add = async ({title, history, blobs, thumbs}) => { // an imported conversation; ``blobs`` by the path of its files
    const id = newId();
    for (const [path, blob] of blobs) await write('pictures', blob, path);
    history[0] = {...history[0], metadata: {...history[0].metadata, id}};
    await write('chats', {id, title, time: Date.now(), history, thumbs});
    changed();
    return id;
  };

  return {
    say, save, isThere, open, arrived, fresh, settle, reopen, reviveFirst, undone, list, rename, remove, add, read, typed, files, textOf, idOf, newId, gone, thumbs, rate, OPEN,
    connect: (give, tell) => { upload = give; notice = tell; ready(); },
  };
})();
