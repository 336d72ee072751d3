// Keeps thumbs lit: gradio forgets them with the next answer. The browser keeps them beside their conversation.
mmchat.thumbs = (() => {
  const {store} = mmchat;
  const keyOf = (history, index) => `${index} ${store.textOf(history[index])}`; // another answer has another thumb
  const of = history => { // the thumb of each message, if it has one
    const given = store.thumbs(store.idOf(history));
    return history.map((_, index) => given[keyOf(history, index)] ?? null);
  };
  const from = (history, names) => Object.fromEntries(names.flatMap((name, index) =>
    ['Like', 'Dislike'].includes(name) ? [[keyOf(history, index), name]] : []));
  const show = history => {
    const given = of(history ?? []);
    const lit = (history ?? []).flatMap((turn, index) => turn.role !== 'assistant' ? []
      : turn.content.map(() => given[index])); // each part of a message is a row
    return [{__type__: 'update', feedback_value: lit}];
  };
  const rate = (history, index, name) => {
    if (history[index]) store.rate(store.idOf(history), keyOf(history, index), name);
    return show(history);
  };
  return {show, rate, of, from};
})();
