// What every page of the site shares: how it asks the server, the language it speaks, light or dark.
(() => {
  "use strict";
  const { storage: { read, write } } = window.reelhfParts;
  const LANGUAGES = ["en", "zh"];
  const SCRIPT = "/annotate/site.js";
  const ROOT = (document.querySelector(`script[src$="${SCRIPT}"]`)?.getAttribute("src") || SCRIPT).slice(0, -SCRIPT.length);
  const SLIDER = new Set(["radio", "range", "checkbox"]);

  let me = null;
  let words = {};
  let language = "en";
  let skew = 0; // the server's clock less ours

  const go = (path) => window.location.assign(ROOT + path);

  // What the server says. Throws an error with `status`, none if the server was not reached.
  async function call(path, sent, { leaving = false } = {}) {
    const options = sent === undefined ? {} : {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": me.csrf },
      body: JSON.stringify(sent),
      keepalive: leaving, // it goes out although the page closes
    };
    const answer = await fetch(ROOT + path, { ...options, credentials: "same-origin" });
    if (answer.status === 401) {
      go("/login");
      return new Promise(() => {}); // the page is going away
    }
    const said = Date.parse(answer.headers.get("date"));
    if (said) skew = said - Date.now();
    const data = await answer.json().catch(() => ({ detail: `HTTP ${answer.status}` }));
    if (!answer.ok) {
      const error = new Error((data.problems || [data.detail]).join(". "));
      error.status = answer.status;
      error.wait = 1000 * Number(answer.headers.get("retry-after"));
      throw error;
    }
    return data;
  }

  const has = (name) => words[language]?.[name] !== undefined;
  const say = (name, values = {}) =>
    (words[language]?.[name] ?? name).replace(/\{(\w+)\}/g, (_, key) => String(values[key] ?? ""));

  const isDark = () => document.body.classList.contains("dark");

  function setTheme(name) {
    document.body.classList.toggle("dark", name === "dark");
    document.documentElement.classList.toggle("dark", name === "dark");
  }

  function setLanguage(name) {
    language = name;
    document.documentElement.lang = name;
  }

  // Who is signed in; afterwards the page can speak.
  async function start() {
    [me, words] = await Promise.all([call("/api/me"), call("/annotate/strings.json")]);
    setLanguage(read("language") || (navigator.language.startsWith("zh") ? "zh" : "en"));
    if (read("theme")) setTheme(read("theme"));
    return me;
  }

  function switchLanguage() {
    setLanguage(LANGUAGES[(LANGUAGES.indexOf(language) + 1) % LANGUAGES.length]);
    write("language", language);
  }

  function switchTheme() {
    setTheme(isDark() ? "light" : "dark");
    write("theme", isDark() ? "dark" : "light");
  }

  // True while keys are letters to be typed, not commands.
  const typing = ({ tagName, type, readOnly, disabled }) =>
    !readOnly && !disabled && (tagName === "TEXTAREA" || (tagName === "INPUT" && !SLIDER.has(type)));

  // True if a button has the keyboard and this key would press it.
  const presses = ({ target, code }) => target.tagName === "BUTTON" && (code === "Space" || code === "Enter");

  const refresh = () => document.getElementById("refresh")?.click();

  // Marks that no Gradio property carries.
  const setRole = (id, role) => document.getElementById(id)?.setAttribute("role", role);

  window.reelhfParts = {
    ...window.reelhfParts,
    site: {
      start, call, go, say, has, isDark, switchLanguage, switchTheme, typing, presses, refresh, setRole,
      language: () => language, now: () => Date.now() + skew,
    },
  };
})();
