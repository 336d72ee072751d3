// What must happen in the browser. Titles and texts of visitors are set with textContent, never as HTML.
window.mmchat = (() => {
  const openSidebar = () => {
    if (innerWidth > 900) document.querySelector('#side:not(.open) .toggle-button')?.click();
  };

  let areRead = false; // else the defaults would be written over what is kept
  const SETTINGS = 'mmchat-settings';
  const settings = {
    write: values => { if (areRead) localStorage.setItem(SETTINGS, JSON.stringify(values)); return []; },
    read: defaults => {
      try {
        const kept = JSON.parse(localStorage.getItem(SETTINGS));
        if (Array.isArray(kept) && kept.length === defaults.length) return kept;
      } catch (error) { console.debug('settings', error); }
      return defaults;
    },
  };

  // Switches of the Voice tab.
  const SWITCHES = {check: true, aloud: false}; // and their defaults
  const switches = {
    write: values => {
      Object.keys(SWITCHES).forEach((name, index) => localStorage.setItem(`mmchat-${name}`, JSON.stringify({on: values[index]})));
      return [];
    },
    read: () => Object.entries(SWITCHES).map(([name, on]) => JSON.parse(localStorage.getItem(`mmchat-${name}`))?.on ?? on),
  };
  // The question that is being typed, so that the way to the other page and back loses nothing.
  const DRAFT = 'mmchat-draft';
  let pictures = '';
  const draft = {
    write: box => {
      if (areRead) sessionStorage.setItem(DRAFT, JSON.stringify(box));
      const shown = box.files.map(file => file.path).join('\n');
      if (shown && shown !== pictures) mmchat.tellPictures?.(); // the model reads them while the question is typed
      pictures = shown;
      return [];
    },
    read: async () => {
      const {text, files} = JSON.parse(sessionStorage.getItem(DRAFT)) ?? {text: '', files: []};
      const areThere = await Promise.all(files.map(mmchat.store.isThere));
      return {text, files: files.filter((_, index) => areThere[index])};
    },
  };
  const start = async defaults => { // what the browser keeps, into the settings, the switches and the question box
    openSidebar();
    areRead = true;
    const box = draft.read(); // before gradio tells that the box is empty
    return [...settings.read(defaults), ...switches.read(), await box];
  };
  const openText = () => document.querySelector('#tabs [role=tab]').click();

  // Drop and paste anywhere: the files go to the input of the question box, or of the page "Batch".
  const hasFiles = event => [...event.dataTransfer.types].includes('Files');
  const images = list => [...list].filter(file => file.type.startsWith('image/'));
  const give = list => {
    const box = document.querySelector('#box input[type=file]'), batch = document.querySelector('#files input[type=file]');
    const input = box ?? batch, files = box ? images(list) : [...list]; // the page "Batch" says what it does not take
    if (!input || !files.length) return false;
    const all = new DataTransfer();
    files.forEach(file => all.items.add(file));
    input.files = all.files;
    input.dispatchEvent(new Event('change', {bubbles: true}));
    return true;
  };
  document.addEventListener('click', event => { // else a browser does not tell that the same picture is chosen again
    if (event.target.matches('input[type=file]')) event.target.value = '';
  }, true);
  document.addEventListener('dragover', event => {
    if (hasFiles(event)) event.preventDefault();
  });
  document.addEventListener('drop', event => { // before the microphone, which takes recordings only
    const files = event.dataTransfer.files, isRecording = event.target.closest('#mic') && !images(files).length;
    if (!hasFiles(event) || isRecording || event.target.closest('#box, #files')) return;
    event.preventDefault();
    event.stopPropagation();
    give(files);
  }, true);
  document.addEventListener('paste', event => {
    const {files, types} = event.clipboardData, isText = event.target.matches?.('input, textarea') && types.includes('text/plain');
    if (!isText && !event.target.closest?.('#box') && give(files)) event.preventDefault();
  });

  // Names and roles that gradio's components lack for screen readers.
  const name = (element, text) => { if (!element.getAttribute('aria-label')) element.setAttribute('aria-label', text); };
  const picturesByQuestion = () => { // the model is told the same numbers, so that a question can name one
    const questions = [[]];
    document.querySelectorAll('#chat .bot-row, #chat .user-row .image-container').forEach(element => {
      if (element.matches('.bot-row')) questions.push([]); else questions.at(-1).push(element);
    });
    return questions;
  };
  const repair = () => {
    document.querySelectorAll('#chat .examples[role=list], .thumbnail-wrapper[role=listitem]')
      .forEach(element => element.setAttribute('role', 'group'));
    const addFiles = document.querySelectorAll('#batch .icon-button:has(.upload-container)');
    addFiles.forEach(element => element.ariaLabel = element.title = 'Add files');
    [...addFiles, ...document.querySelectorAll('.toast-header')].forEach(element => { // a button in a button
      element.setAttribute('role', 'group');
      element.tabIndex = -1;
    });
    document.querySelectorAll('#box [data-testid=submit-button]').forEach(element => element.ariaLabel = element.textContent.trim());
    document.querySelectorAll('#box textarea').forEach(element => name(element, 'Your question'));
    picturesByQuestion().forEach(pictures => pictures.forEach((element, index) => {
      const button = element.querySelector('button'), picture = element.querySelector('img');
      if (button) name(button, `Enlarge picture ${index + 1}`);
      if (picture && !picture.alt) picture.alt = `Picture ${index + 1}`;
      if (pictures.length > 1) element.dataset.caption = `Picture ${index + 1}`;
    }));
    document.querySelectorAll('#chat .thought-group .title > .arrow > button').forEach(element => {
      element.disabled = true;
      name(element, 'Details');
    });
  };
  let due = false;
  new MutationObserver(() => {
    if (!due) { due = true; requestAnimationFrame(() => { due = false; repair(); }); }
  }).observe(document, {childList: true, subtree: true});

  return {start, openText, draft, settings, switches};
})();
