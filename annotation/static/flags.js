// The queue of flagged tasks: one is chosen, watched and decided about. Gradio components call in through `window.reelhf.*`; each
// call returns the new value of every component, in the order of `VIEW` and `WORDS` in annotation/flag_page.py.
(() => {
  "use strict";
  const { Player, site } = window.reelhfParts;
  const { say, setRole, refresh } = site;
  const POLL_MS = 60000;
  const SHORT = 90; // characters of a prompt in the list

  let queue = { tasks: [], waiting: 0, conflicts: 0 };
  let chosen = null;
  let note = "";
  let status = "";
  let busy = false;

  const body = () => document.body.dataset;
  const player = new Player(say, () => {}, (clip) => tell(say("clip_broken_here", { clip })));

  // Whatever people wrote, as Markdown that shows it letter by letter.
  const plain = (text) => String(text).replace(/\s+/g, " ").replace(/[!-/:-@[-`{-~]/g, (c) => (c === "&" ? "&amp;" : c === "<" ? "&lt;" : `\\${c}`));

  const named = ({ report, what }) => say(`${report}_${what}`).replace(/^\d+\s+/, "");

  function tell(text) {
    status = text;
    refresh();
  }

  // --- the queue --------------------------------------------------------------------------------

  async function load() {
    queue = await site.call("/api/flagged");
    const same = (task) => task.task_id === chosen?.task_id;
    if (!queue.tasks.some(same)) return show(queue.tasks[0] || null);
    // its clips go on playing from the links they have
    queue.tasks = queue.tasks.map((task) => (same(task) ? Object.assign(chosen, { reports: task.reports }) : task));
  }

  function show(task) {
    player.stop();
    chosen = task;
    note = "";
    Object.assign(body(), { state: task ? "work" : "done", mode: "" });
    if (!task) return;
    const clips = task.clips.map((url, i) => ({ letter: String(i + 1), url }));
    body().k = clips.length;
    player.show({ clips, first_frame_url: task.first_frame_url, fps: task.fps });
  }

  function choose(taskId) {
    const task = queue.tasks.find((each) => each.task_id === Number(taskId));
    if (task && task !== chosen && !busy) {
      status = "";
      show(task);
    }
    return render();
  }

  function move(by) {
    const at = queue.tasks.indexOf(chosen) + by;
    if (queue.tasks[at]) choose(queue.tasks[at].task_id);
    document.querySelector("#queue label.selected")?.scrollIntoView({ block: "nearest" });
  }

  async function decide(decision) {
    if (!chosen || busy) return render();
    busy = true;
    const { task_id } = chosen, place = queue.tasks.indexOf(chosen);
    try {
      await site.call("/api/decide", { task_id, decision, note });
      status = say(`decided_${decision}`, { task: task_id });
    } catch (error) {
      status = say("not_decided", { reason: error.status ? error.message : say("no_connection") });
      if (error.status !== 404) {
        body().mode = "";
        busy = false;
        return render();
      }
    }
    await next(place);
    busy = false;
    return render();
  }

  // The task that moved up into the place of the one that left.
  async function next(place) {
    try {
      queue = await site.call("/api/flagged");
    } catch {
      status += ` ${say("no_connection")}`;
      queue.tasks.splice(place, 1);
    }
    show(queue.tasks[Math.min(place, queue.tasks.length - 1)] || null);
  }

  const reopen = () => decide("reopen");
  const remove = () => (body().mode === "removal" ? decide("remove") : render());

  function askRemoval() {
    if (chosen && !busy) body().mode = "removal";
    return render();
  }

  function cancel() {
    body().mode = "";
    return render();
  }

  // --- showing ----------------------------------------------------------------------------------

  function line(task) {
    const kinds = [...new Set(task.reports.filter((r) => r.report !== "ruling").map(named))];
    const prompt = task.prompt.length > SHORT ? `${task.prompt.slice(0, SHORT)}…` : task.prompt;
    return [`#${task.task_id}  ${kinds.join(", ")}\n${prompt}`, task.task_id];
  }

  function reports() {
    if (!chosen) return "";
    const rows = chosen.reports.map((report) => [
      new Date(report.created_ms).toLocaleString(site.language(), { dateStyle: "short", timeStyle: "short" }),
      plain(report.pseudonym),
      `**${plain(named(report))}**`,
      plain(report.note),
      (report.letters || []).map((letter, i) => `${letter}\u202f=\u202f${i + 1}`).sort().join(", "),
    ]);
    const heads = ["when", "who", "what", "note", "letters"].map((name) => say(`report_${name}`));
    const facts = say("task_facts", { judged: chosen.num_judgments, wanted: chosen.need_n, project: plain(chosen.project) });
    return [facts, "", ...[heads, heads.map(() => "---"), ...rows].map((cells) => `| ${cells.join(" | ")} |`)].join("\n");
  }

  function summary() {
    const { waiting, conflicts, tasks } = queue;
    const parts = [say("flags_waiting", { waiting })];
    if (waiting > tasks.length) parts.push(say("flags_shown", { shown: tasks.length }));
    if (conflicts) parts.push(say("conflicts_waiting", { conflicts }));
    return parts.join(" · ");
  }

  function render() {
    decorate();
    return [
      summary(),
      { __type__: "update", choices: queue.tasks.map(line), value: chosen?.task_id ?? null, label: say("flagged_tasks") },
      chosen ? chosen.prompt : "",
      reports(),
      say("removal"),
      note,
      status,
      chosen ? "" : say("flags_done"),
    ];
  }

  function renderWords() {
    player.translate();
    return [
      say(site.isDark() ? "light" : "dark"),
      ...["language", "help_button", "to_work", "to_quality", "reopen", "remove", "removal_yes", "cancel", "flags_keys"].map((name) => say(name)),
      { __type__: "update", placeholder: say("ruling_note"), label: say("ruling_note") },
      { __type__: "update", label: say("prompt") },
    ];
  }

  function decorate() {
    body().page = "flags";
    setRole("status", "status");
    setRole("removal", "alert");
  }

  // --- keys and what the components call ----------------------------------------------------------

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { target } = event;
    if (event.code === "Escape") {
      target.blur();
      body().help = "";
      if (player.zoomed >= 0) player.zoom(-1);
      cancel();
      refresh();
      return;
    }
    if (site.typing(target) || site.presses(event)) return;
    const does = command(event);
    if (!does) return;
    event.preventDefault();
    event.stopPropagation();
    if (document.activeElement !== document.body) document.activeElement?.blur();
    does();
    refresh();
  }

  function command(event) {
    if (event.key === "?") return toggleHelp;
    if (!chosen || busy) return null;
    if (body().mode === "removal") return event.code === "KeyY" ? () => remove().then(refresh) : null;
    switch (event.code) {
      case "KeyN": case "ArrowDown": return () => move(1);
      case "KeyP": case "ArrowUp": return () => move(-1);
      case "KeyR": return () => reopen().then(refresh);
      case "KeyX": return askRemoval;
      case "KeyM": return () => noteField()?.focus();
      default: return player.command(event);
    }
  }

  function toggleHelp() {
    body().help = body().help ? "" : "1";
    return render();
  }

  function leave(path) {
    site.go(path);
    return render();
  }

  function switchLanguage() {
    site.switchLanguage();
    status = "";
    return [...render(), ...renderWords()];
  }

  function switchTheme() {
    site.switchTheme();
    return [...render(), ...renderWords()];
  }

  const noteField = () => document.querySelector("#note input, #note textarea");

  function noted(event) {
    if (event.target === noteField()) note = event.target.value;
  }

  async function start(numView, numWords) {
    await site.start();
    await load();
    const [view, words] = [render(), renderWords()];
    if (view.length !== numView || words.length !== numWords)
      throw new Error(`the page has ${numView} + ${numWords} outputs, the script ${view.length} + ${words.length}`);
    document.addEventListener("keydown", onKey, true);
    document.addEventListener("input", noted, true);
    setInterval(() => {
      if (!busy && !document.hidden) load().then(refresh, () => {}); // it asks again in a minute
    }, POLL_MS);
    return [...view, ...words];
  }

  window.reelhf = { start, render, choose, reopen, askRemoval, remove, cancel, toggleHelp, leave, switchLanguage, switchTheme };
})();
