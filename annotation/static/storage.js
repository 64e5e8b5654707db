// What this browser keeps; where it keeps nothing, things live as long as the page.
(() => {
  "use strict";
  const PREFIX = "reelhf:";

  const memory = new Map();
  let persistent = true;

  function read(key) {
    try {
      const text = localStorage.getItem(PREFIX + key);
      return text === null ? memory.get(key) ?? null : JSON.parse(text);
    } catch {
      return memory.get(key) ?? null;
    }
  }

  function write(key, value) {
    try {
      localStorage.setItem(PREFIX + key, JSON.stringify(value));
      memory.delete(key);
    } catch {
      persistent = false;
      memory.set(key, value);
    }
  }

  function remove(key) {
    memory.delete(key);
    try {
      localStorage.removeItem(PREFIX + key);
    } catch { /* it was never there */ }
  }

  function keys(prefix) {
    let stored = [];
    try {
      stored = Object.keys(localStorage).filter((k) => k.startsWith(PREFIX)).map((k) => k.slice(PREFIX.length));
    } catch { /* memory only */ }
    return [...new Set([...stored, ...memory.keys()])].filter((k) => k.startsWith(prefix));
  }

  window.reelhfParts = { ...window.reelhfParts, storage: { read, write, remove, keys, keeps: () => persistent } };
})();
