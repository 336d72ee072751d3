// A pencil on every question; runs when gradio has placed it. Gradio's own editing breaks on questions with pictures.
const label = 'Edit question';
const edit = bar => {
  const row = bar.closest('.message-buttons').previousElementSibling;
  trigger('edit', {nth: [...document.querySelectorAll('#chat .user-row')].indexOf(row)});
};
const place = () => document.querySelectorAll('#chat .user-row + .message-buttons .icon-button-wrapper').forEach(bar => {
  if (bar.querySelector('.mm-edit')) return;
  const button = Object.assign(document.createElement('button'), {className: 'mm-edit', textContent: '✎', title: label, onclick: () => edit(bar)});
  button.setAttribute('aria-label', label);
  bar.append(button);
});
new MutationObserver(place).observe(document.querySelector('#chat') ?? document.body, {childList: true, subtree: true});
place();
