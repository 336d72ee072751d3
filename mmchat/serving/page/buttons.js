// A pencil on every question, and Retry on one that has no answer; runs when gradio has placed it. Gradio's own editing
// breaks on questions with pictures, and its Retry is on answers only.
const edit = bar => {
  const row = bar.closest('.message-buttons').previousElementSibling;
  trigger('edit', {nth: [...document.querySelectorAll('#chat .user-row')].indexOf(row)});
};
const button = (className, textContent, title, onclick) => {
  const made = Object.assign(document.createElement('button'), {className, textContent, title, onclick});
  made.setAttribute('aria-label', title);
  return made;
};
const place = () => document.querySelectorAll('#chat .user-row + .message-buttons .icon-button-wrapper').forEach(bar => {
  if (bar.querySelector('.mm-edit')) return;
  bar.append(button('mm-edit', '✎', 'Edit question', () => edit(bar)),
    button('mm-retry', '↻', 'Retry', () => trigger('again'))); // page.css shows it below the last message only
});
window.mmchat.tellPictures = () => trigger('pictures');
new MutationObserver(place).observe(document.querySelector('#chat') ?? document.body, {childList: true, subtree: true});
place();
