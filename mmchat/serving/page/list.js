// The list of conversations in the sidebar; runs when gradio has placed it. Titles are text, never HTML.
const rows = element.querySelector('ul'), note = element.querySelector('p');
const find = element.querySelector('input[type=search]'), file = element.querySelector('input[type=file]');
const store = mmchat.store;
store.connect(upload, reason => trigger('notice', {reason}));
const open = async id => { window.mmchat.opened = await store.open(id); trigger('open'); };
const button = (text, label, action) => {
  const made = Object.assign(document.createElement('button'), {textContent: text, title: label, onclick: action});
  made.setAttribute('aria-label', label);
  return made;
};
const row = chat => {
  const item = document.createElement('li'), opens = button(chat.title, `Open ${chat.title}`, () => open(chat.id));
  if (sessionStorage.getItem(store.OPEN) === chat.id) opens.setAttribute('aria-current', 'true');
  item.append(opens,
    button('✎', `Rename ${chat.title}`, async () => {
      const title = prompt('Title', chat.title)?.trim();
      if (title) await store.rename(chat.id, title.slice(0, 200));
    }),
    button('×', `Delete ${chat.title}`, async () => {
      if (!confirm(`Delete “${chat.title}”?`)) return;
      const isOpen = sessionStorage.getItem(store.OPEN) === chat.id;
      await store.remove(chat.id);
      if (isOpen) document.querySelector('#fresh').click();
    }));
  return item;
};
const draw = async () => {
  const sought = find.value.trim().toLowerCase();
  const has = chat => [chat.title, ...chat.history.map(store.textOf)].some(text => text.toLowerCase().includes(sought));
  const found = (await store.list()).filter(has);
  rows.replaceChildren(...found.map(row));
  note.textContent = sought && !found.length ? 'No conversation matches.' : '';
};
find.oninput = draw;
addEventListener('mmchat-list', draw);
draw();
element.querySelector('.import').onclick = () => file.click();
file.onchange = async () => {
  const [given] = file.files;
  file.value = '';
  if (!given) return;
  try { await open(await mmchat.transfer.read(given)); }
  catch (error) {
    console.debug('import', error);
    trigger('notice', {reason: error.name === 'QuotaExceededError' ? 'full' : 'refused'});
  }
};
