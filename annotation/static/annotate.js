// The page: one task at a time. Gradio components call in through `window.reelhf.*`; each call returns the new value of every
// component, in the order of `Page` in annotation/app.py. Prompts, notes and opinions are only ever set as text or plain Markdown.
(() => {
  "use strict";
  const { Answers, Drafts, LETTERS, Outbox, Player, site, storage } = window.reelhfParts;
  const { say, setRole } = site;
  const ROWS = 5;
  const WORST_KEYS = ["KeyQ", "KeyW", "KeyE", "KeyR"];
  const [MIN_PIXELS, MAX_PIXELS, VETO_PIXELS] = [110, 560, 61]; // heights of a clip and of the veto line
  const [GAP_PIXELS, NARROW_PIXELS, PER_LINE] = [12, 900, 5]; // four clips and a first frame stay in one line
  const POLL_MS = 60000;
  const RETRY_MS = 3000;

  let me = null;
  let task = null;
  let answers = null;
  let note = "";
  let status = "";
  let progress = null;
  let nothing = "empty"; // why there is no task
  let busy = false;
  let shownAt = 0;
  let heartbeat = null;
  let outbox = null;
  let revising = null; // {judgment_id, root} while an older answer is changed
  let feedback = "";
  const guides = {}; // version -> language -> Markdown
  let sending = ""; // the key of the answer this page waits for

  const body = () => document.body.dataset;
  const question = (dimension) => {
    const q = task.questions[dimension];
    return { ...q, ...(q.translations?.[site.language()] || {}) };
  };
  const drafts = new Drafts(
    (presentation, draft, leaving) => call("/api/draft", { presentation, draft }, { leaving }), site.now);
  const label = (index) => question(task.dimensions[index]).label;
  const player = new Player(say, () => { fit(); gate(); }, (clip) => tell(say("clip_broken", { clip })));

  // --- the server -------------------------------------------------------------------------------

  async function call(path, sent, options) {
    try {
      return await site.call(path, sent, options);
    } catch (error) {
      error.message = readable(error.message);
      throw error;
    }
  }

  const readable = (text) =>
    Object.keys(task?.questions || {}).reduce((t, d) => t.replaceAll(d, question(d).label), String(text));

  async function beat() {
    if (document.hidden || !task || revising) return;
    try {
      const { leased } = await call("/api/heartbeat", { presentation: task.presentation });
      if (!leased) tell(say("idle"));
    } catch { /* the next beat tries again */ }
  }

  // --- one task ---------------------------------------------------------------------------------

  const draftName = () => `${task.presentation}${revising ? `:${revising.judgment_id}` : ""}`;
  const randomKey = () => Array.from(crypto.getRandomValues(new Uint8Array(18)), (b) => b.toString(16).padStart(2, "0")).join("");

  function draft() {
    const { rows, active, clip } = answers;
    return { rows, active, clip, note, key: task.key, watched: player.watched };
  }

  function saveDraft() {
    if (task) drafts.save(draftName(), task.presentation, draft());
  }

  async function nextTask() {
    const told = await call("/api/claim", {});
    progress = await call("/api/progress");
    if (told.task) await readGuide(told.task);
    revising = null;
    nothing = told.reason;
    show(told.task);
  }

  function show(view, verdict = null) {
    task = view;
    clearInterval(heartbeat);
    player.stop();
    Object.assign(body(), { state: task ? "work" : "done", mode: "", purpose: task?.purpose || "", kind: task?.kind || "" });
    if (!task) return;
    const begun = drafts.load(draftName(), task.draft);
    answers = new Answers(task, say, label);
    if (begun) answers.restore(begun.rows, begun.active, begun.clip);
    else if (verdict) answers.restore(Answers.fromVerdict(task, verdict));
    note = begun?.note ?? verdict?.note ?? "";
    task.key = begun?.key || randomKey();
    shownAt = performance.now();
    Object.assign(body(), { k: task.clips.length, dims: task.dimensions.length });
    player.show(task, begun?.watched ?? verdict?.watched_seconds);
    heartbeat = setInterval(beat, Math.max(5, task.lease_seconds / 3) * 1000);
  }

  // A task is let through once every clip was seen; what was judged before was seen before.
  function unseen() {
    return task && me.must_watch && !revising ? player.unseen(me.must_watch) : [];
  }

  function obstacle() {
    const gap = answers.missing();
    if (gap) return gap;
    const clips = unseen();
    return clips.length ? [answers.active, say("needs_watching", { clips: clips.join(", ") })] : null;
  }

  // --- sending ----------------------------------------------------------------------------------

  async function submit() {
    if (!task || busy) return render();
    if (body().mode === "feedback") return goOn();
    const gap = obstacle();
    if (gap) {
      answers.active = gap[0];
      status = gap[1];
      return render();
    }
    if (me.confirm_pairs && body().mode !== "confirm" && answers.toConfirm().length) {
      player.pause();
      body().mode = "confirm";
      status = "";
      return render();
    }
    const asked = body().mode === "confirm" ? answers.toConfirm() : [];
    asked.forEach((i) => { answers.rows[i].confirmed ??= true; });
    busy = true;
    body().mode = "";
    status = say("saving");
    sending = task.key;
    await outbox.add({
      presentation: task.presentation,
      idempotency_key: task.key,
      revises: revising?.judgment_id ?? null,
      verdict: {
        choices: answers.payload(),
        note,
        seconds: (performance.now() - shownAt) / 1000,
        watched_seconds: player.watchedSeconds(),
        language: site.language(),
      },
    });
    return render();
  }

  // What became of an answer: of the one this page waits for, or of one from before a reload.
  async function told({ receipt, error, kept, body: sent }) {
    const ours = sent.idempotency_key === sending;
    if (kept) {
      status = storage.keeps() ? say("kept") : `${say("kept")} ${say("storage_off")}`;
      if (outbox.waiting > 1) status += ` ${say("waiting", { count: outbox.waiting })}`;
      refresh();
      return;
    }
    if (error && error.status === 422 && ours) {
      answersArrived();
      status = say("not_saved", { reason: error.message });
      refresh();
      return;
    }
    drafts.drop(sent.revises ? `${sent.presentation}:${sent.revises}` : sent.presentation);
    if (error) status = say("not_saved", { reason: error.message });
    else {
      const time = new Date(receipt.submitted_ms).toLocaleTimeString(site.language());
      status = say(receipt.revision ? "changed" : "saved", { id: receipt.judgment_id, time });
    }
    if (ours && receipt && explain(receipt)) {
      answersArrived();
      player.pause();
      body().mode = "feedback";
      refresh();
      return;
    }
    if (ours || !task) await move(nextTask);
    if (ours) answersArrived();
    refresh();
  }

  function answersArrived() {
    busy = false;
    sending = "";
  }

  // Claims until the network is back: an answer that waits must not be the last thing one can do.
  async function move(act) {
    const kept = status;
    try {
      await act();
      status = kept;
    } catch (error) {
      if (error.status && error.status < 500) throw error;
      status = `${kept} ${say("no_connection")}`;
      setTimeout(() => { move(act).then(refresh); }, RETRY_MS);
    }
  }

  // Practice and exam: what was expected. True if there is anything to read.
  function explain({ feedback: graded, exam }) {
    const lines = graded.map((g) => {
      const dimension = question(g.dimension).label;
      const why = g.why?.[site.language()] ?? g.why?.en ?? "";
      const text = g.correct ? say("right", { dimension }) : say("wrong", { dimension, expected: expected(g) });
      return `- ${text}${why ? `. ${why}` : ""}`;
    });
    if (lines.length) lines.unshift(`${say("practice_result", { correct: graded.filter((g) => g.correct).length, asked: graded.length })}\n`);
    if (exam) {
      const name = exam.passed ? "exam_passed" : exam.attempts_left ? "exam_failed_again" : "exam_failed";
      lines.push(say(name, { ...exam, left: exam.attempts_left, percent: Math.round(exam.threshold * 100) }));
    }
    feedback = lines.join("\n");
    return lines.length > 0;
  }

  function expected(g) {
    if (g.tie) return say("expect_tie");
    if (g.scores) return say("expect_scores", { scores: g.scores.map((s, i) => `${LETTERS[i]} ${s ?? "–"}`).join(", ") });
    const parts = [];
    if (g.best !== null) parts.push(say("expect_best", { clip: LETTERS[g.best] }));
    if (g.worst !== null) parts.push(say("expect_worst", { clip: LETTERS[g.worst] }));
    return parts.join(", ");
  }

  async function goOn() {
    if (body().mode !== "feedback") return render();
    feedback = "";
    await move(nextTask);
    return render();
  }

  async function passOn(path, sent, done) {
    if (!task || busy) return render();
    busy = true;
    try {
      await call(path, { presentation: task.presentation, note, ...sent });
      drafts.drop(draftName());
      status = done;
      await move(nextTask);
    } catch (error) {
      status = say("not_skipped", { reason: error.status ? error.message : say("no_connection") });
    } finally {
      busy = false;
    }
    return render();
  }

  const skip = (reason) => (reason ? passOn("/api/skip", { reason }, say("skipped")) : render());
  const flag = (kind) => (kind ? passOn("/api/flag", { flag: kind }, say("flagged")) : render());

  // To what was judged last; again, to the one before.
  async function back() {
    if (busy) return render();
    busy = true;
    try {
      const { reopened } = await call("/api/back", { before: revising?.root ?? null });
      if (!reopened) status = say("nothing_back");
      else {
        if (task) drafts.keep(draftName(), draft());
        await readGuide(reopened.task);
        revising = { judgment_id: reopened.judgment_id, root: reopened.root };
        status = "";
        show(reopened.task, reopened.verdict);
      }
    } catch (error) {
      status = error.status ? error.message : say("no_connection");
    } finally {
      busy = false;
    }
    return render();
  }

  // --- showing ----------------------------------------------------------------------------------

  function tell(text) {
    status = text;
    refresh();
  }

  const { refresh } = site;

  function minutes(seconds) {
    if (seconds < 90) return say("seconds", { n: Math.max(10, Math.round(seconds / 10) * 10) });
    return say("minutes", { n: Math.round(seconds / 60) });
  }

  function progressText() {
    if (!progress) return "";
    const { judged, wanted } = progress;
    if (!task) return say("judged", { judged });
    if (site.has(`${task.purpose}_intro`)) return say(`${task.purpose}_intro`);
    const parts = [];
    if (revising) parts.push(`**${say("changing", { id: revising.judgment_id })}**`);
    else if (task.purpose === "adjudication") parts.push(`**${say("purpose_adjudication")}**`);
    parts.push(say("judged_of", { judged, wanted }));
    if (judged >= wanted) parts.push(say("all_asked"));
    else if (progress.eta_seconds !== null) parts.push(say("left", { time: minutes(progress.eta_seconds) }));
    return parts.join(" · ");
  }

  function heads() {
    if (!task) return ["", "", ""];
    const keys = (shift) => `\`${shift}1\`–\`${shift}${task.clips.length}\``;
    if (task.kind === "score") return [`${say("score", { clip: LETTERS[answers.clip] })}  ${say("score_hint")}`, "", say("or")];
    const best = say(task.kind === "gsb" ? "better" : "best");
    return [`${best}  ${keys("")}`, task.kind === "gsb" ? "" : `${say("worst")}  ${keys("⇧")}`, say("or")];
  }

  function questionText(index) {
    const dimension = task.dimensions[index], q = question(dimension);
    const lines = [`**${q.label}** ${q.question}`, q.help];
    if (task.kind === "score") {
      const { scores } = answers.rows[index];
      lines.push(task.clips.map((c, i) => (i === answers.clip ? `**${c.letter} ${scores[i] ?? "–"}**` : `${c.letter} ${scores[i] ?? "–"}`)).join(" · "));
    }
    const said = task.opinions?.[dimension];
    if (said?.length) lines[1] = say("said", { list: said.map(opinion).join("; ") });
    return lines.join("\n\n");
  }

  function opinion({ status: state, best, worst, scores }) {
    if (scores) return scores.map((s, i) => `${LETTERS[i]} ${s}`).join(" ");
    if (state !== "ok" || best === null) return say(`said_${state === "ok" ? "tie" : state}`);
    return say("over", { best: LETTERS[best], worst: LETTERS[worst] });
  }

  function vetoText(index) {
    if (index < 0) return "";
    const reason = answers.reasonFor(index, answers.rows[index].veto);
    const none = answers.openPairs(index).length ? "" : ` ${say("no_open_pair")}`;
    return `${reason}. ${say("clash_end")}${none}`;
  }

  function confirmText() {
    if (body().mode !== "confirm") return "";
    const pairs = answers.toConfirm().map((i, n) => {
      const a = answers.rows[i];
      return say("confirm_pair", { number: n + 1, dimension: label(i), best: LETTERS[a.best], worst: LETTERS[a.worst] });
    });
    return `${say("confirm")} ${say("confirm_how")}\n\n${pairs.join(" · ")}`;
  }

  function markedWorse() {
    if (body().mode !== "confirm") return [];
    return answers.toConfirm().flatMap((i, n) => (answers.rows[i].confirmed === false ? [String(n + 1)] : []));
  }

  // How to judge the task at hand: each project asks by its own version.
  function guideText() {
    const guide = guides[task?.guideline_version ?? me.guideline_version] || {};
    return guide[site.language()] ?? guide.en ?? "";
  }

  async function readGuide({ guideline_version: version, presentation }) {
    if (guides[version]) return;
    try {
      guides[version] = (await call(`/api/guide?presentation=${presentation}`)).guide;
    } catch { /* the next task of this version asks again */ }
  }

  function doneText() {
    if (task) return "";
    const judged = progress?.judged || 0;
    return say(nothing === "empty" ? (judged ? "done" : "done_empty") : `done_${nothing}`, { judged });
  }

  function render() {
    const fill = (make) =>
      Array.from({ length: ROWS }, (_, i) => (task && i < answers.rows.length ? make(answers.rows[i], i) : null));
    const letter = (slot) => (slot === null ? null : LETTERS[slot]);
    const vetoed = task ? answers.vetoed() : -1;
    decorate(vetoed);
    return [
      task ? task.prompt : "",
      progressText(),
      ...heads(),
      ...fill((_, i) => questionText(i)),
      ...fill((a) => letter(a.best)),
      ...fill((a) => letter(a.worst)),
      ...fill((a) => (a.status === "no_valid_pair" ? null : a.status)),
      ...fill((a) => (a.scores[answers.clip] ? String(a.scores[answers.clip]) : null)),
      vetoText(vetoed),
      task ? confirmText() : "",
      task ? markedWorse() : [],
      feedback,
      note,
      status,
      doneText(),
      guideText(),
    ];
  }

  // The words of what never changes but with the language.
  function renderWords() {
    const update = (values) => ({ __type__: "update", ...values });
    const reasons = (name, list) => update({ choices: list.map((r) => [say(`${name}_${r}`), r]), label: say(`${name}_why`) });
    const others = update({ choices: [[say("tie"), "tie"], [say("cannot_judge"), "cannot_judge"]] });
    player.translate();
    return [
      say(site.isDark() ? "light" : "dark"),
      ...["language", "guide_button", "help_button", "to_flagged", "sign_out", "another", "no_pair", "confirm_yes"].map((name) => say(name)),
      ...["cancel", "cancel", "cancel", "go_on", "back", "flag", "skip", "submit", "keys"].map((name) => say(name)),
      ...Array.from({ length: ROWS }, () => others),
      reasons("skip", me.skip_reasons),
      reasons("flag", me.flags),
      update({ placeholder: say("note"), label: say("note") }),
      update({ label: say("prompt") }),
    ];
  }

  const renderAll = () => [...render(), ...renderWords()];

  // Marks that no Gradio property carries: the active row, blocked letters, labels for screen readers, rings around the clips.
  function decorate(vetoed) {
    body().veto = vetoed >= 0 ? "1" : "";
    body().pairs = task && body().mode === "confirm" ? answers.toConfirm().length : "";
    document.documentElement.style.setProperty(
      "--done-fraction", progress && progress.wanted ? Math.min(1, progress.judged / progress.wanted) : 0);
    setRole("status", "status");
    for (const id of ["veto", "confirm", "feedback"]) setRole(id, "alert");
    for (let i = 0; i < ROWS; i++) decorateRow(i);
    markClips(vetoed);
    gate();
    requestAnimationFrame(fit);
  }

  function decorateRow(index) {
    const row = document.getElementById(`row-${index}`);
    const a = answers?.rows[index];
    if (!row || !task || !a) return;
    const state = a.veto !== null ? "veto" : a.status === "no_valid_pair" ? "none" : answers.answered(a) ? "ok" : "";
    Object.assign(row.dataset, { active: index === answers.active ? "1" : "", state, none: say("no_pair_mark") });
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", label(index));
    for (const kind of ["best", "worst", "other", "score"]) {
      const radios = row.querySelector(`.letters.${kind}`);
      radios?.setAttribute("role", "radiogroup");
      radios?.setAttribute("aria-label", say(`row_${kind}`, { dimension: label(index), clip: LETTERS[answers.clip] }));
    }
    for (const kind of ["best", "worst"]) {
      row.querySelectorAll(`.${kind} label`).forEach((element, slot) => {
        const trial = kind === "best" ? [slot, -1] : [-1, slot];
        element.dataset.blocked = a.constrained && answers.clashOf(index, trial) >= 0 ? "1" : "";
      });
    }
  }

  function markClips(vetoed) {
    if (!task) return;
    const marked = answers.rows[vetoed >= 0 ? vetoed : answers.active];
    task.clips.forEach((_, slot) => {
      let mark = marked.best === slot ? "best" : marked.worst === slot ? "worst" : "";
      if (task.kind === "score") mark = slot === answers.clip ? "scored" : "";
      player.mark(slot, mark);
    });
  }

  // The button says by its look whether Enter would do; what is missing is said when it is pressed.
  function gate() {
    const submitButton = document.getElementById("submit");
    if (!submitButton) return;
    const open = task && !busy && !obstacle();
    submitButton.dataset.ready = open ? "1" : "";
    submitButton.setAttribute("aria-disabled", open ? "false" : "true");
    const waiting = unseen();
    player.stage?.querySelectorAll("figure[data-letter]").forEach((figure) => {
      figure.dataset.unseen = waiting.includes(figure.dataset.letter) ? "1" : "";
    });
  }

  // The clips get all the height the rest of the page leaves, so that a task never needs scrolling; the veto line has its place kept.
  function fit() {
    const stage = document.querySelector("#player .stage");
    const video = stage?.querySelector("video");
    if (!task || !video || window.innerWidth <= NARROW_PIXELS) return;
    const below = ["actions", "skip-panel", "flag-panel", "confirm", "feedback"].map((id) => document.getElementById(id).getBoundingClientRect().bottom);
    const rest = Math.max(...below) + window.scrollY - stage.getBoundingClientRect().height;
    const kept = body().veto || body().mode ? 0 : VETO_PIXELS;
    const aspect = video.videoWidth ? video.videoWidth / video.videoHeight : 1;
    const count = player.zoomed >= 0 ? 1 : stage.children.length;
    const sizes = [1, 2].map((lines) => {
      const across = Math.ceil(count / lines);
      const whole = (stage.clientWidth - GAP_PIXELS * (across - 1)) / across / aspect;
      const room = (window.innerHeight - rest - kept - 14 - GAP_PIXELS * (lines - 1)) / lines;
      return [Math.floor(Math.max(MIN_PIXELS, Math.min(room, whole, MAX_PIXELS))), across];
    });
    const [height, across] = sizes[count > PER_LINE && sizes[1][0] > sizes[0][0] ? 1 : 0];
    stage.style.setProperty("--clip-height", `${height}px`);
    stage.style.setProperty("--clip-width", `${Math.floor(height * aspect)}px`);
    stage.style.setProperty("--across", across);
  }

  // --- keys -------------------------------------------------------------------------------------

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target, typing = site.typing(target);
    if (event.code === "Escape") {
      const idle = !typing && !body().mode && !body().help && !body().guide && player.zoomed < 0;
      target.blur();
      if (idle && revising && !busy) move(nextTask).then(refresh);
      Object.assign(body(), { help: "", guide: "" });
      if (player.zoomed >= 0) player.zoom(-1);
      closePanels();
      refresh();
      return;
    }
    if (typing || site.presses(event)) return;
    const does = command(event);
    if (!does) return;
    event.preventDefault();
    event.stopPropagation();
    if (document.activeElement && document.activeElement !== document.body) document.activeElement.blur();
    does();
  }

  function command(event) {
    const digit = Number(/^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1] ?? NaN);
    const act = (work) => () => { work(); refresh(); };
    if (event.key === "?") return () => toggle("help");
    if (event.code === "KeyG") return () => toggle("guide");
    if (busy) return null;
    if (event.code === "KeyB" && body().mode !== "feedback") return () => back().then(refresh);
    if (!task) return null;
    const enter = event.code === "Enter" || event.code === "NumpadEnter";
    switch (body().mode) {
      case "skip": return me.skip_reasons[digit - 1] ? () => skip(me.skip_reasons[digit - 1]).then(refresh) : null;
      case "flag": return me.flags[digit - 1] ? () => flag(me.flags[digit - 1]).then(refresh) : null;
      case "feedback": return enter ? () => goOn().then(refresh) : null;
      case "confirm":
        if (enter || event.code === "KeyY") return () => submit().then(refresh);
        return digit >= 1 ? act(() => toggleWorse(digit - 1)) : null;
      default:
    }
    if (task.kind === "score" && digit >= 1 && digit <= 5) return act(() => choose(answers.active, "score", digit));
    if (task.kind !== "score" && digit >= 1 && digit <= task.clips.length)
      return act(() => choose(answers.active, event.shiftKey ? "worst" : "best", digit - 1));
    const worst = WORST_KEYS.indexOf(event.code);
    if (worst >= 0 && task.kind !== "score") return act(() => choose(answers.active, "worst", worst));
    const row = (by) => act(() => { answers.active = (answers.active + by + answers.rows.length) % answers.rows.length; });
    const clip = (by) => act(() => { answers.clip = (answers.clip + by + task.clips.length) % task.clips.length; });
    switch (event.code) {
      case "KeyT": return task.kind === "score" ? null : act(() => choose(answers.active, "status", "tie"));
      case "KeyU": return act(() => choose(answers.active, "status", "cannot_judge"));
      case "KeyN": case "ArrowDown": return row(1);
      case "KeyP": case "ArrowUp": return row(-1);
      case "ArrowLeft": return task.kind === "score" ? clip(-1) : null;
      case "ArrowRight": return task.kind === "score" ? clip(1) : null;
      case "KeyC": return act(() => change(() => answers.chooseAnother()));
      case "KeyX": return act(() => change(() => answers.noValidPair()));
      case "KeyS": return act(() => openPanel("skip"));
      case "KeyF": return act(() => openPanel("flag"));
      case "KeyM": return () => noteField()?.focus();
      default: return enter ? () => submit().then(refresh) : player.command(event);
    }
  }

  // --- what the components call -------------------------------------------------------------------

  function change(work) {
    status = "";
    work();
    saveDraft();
  }

  function choose(row, kind, value) {
    if (body().mode === "confirm") body().mode = "";
    change(() => answers.choose(row, kind, value));
    const a = answers.rows[row];
    if (a.best !== null && a.worst !== null)
      player.announce(say("say_pair", { dimension: label(row), best: LETTERS[a.best], worst: LETTERS[a.worst] }));
  }

  function picked(row, kind, value) {
    if (task && !busy && body().mode !== "feedback" && row < answers.rows.length && value !== null && value !== undefined) {
      const said = kind === "status" ? value : kind === "score" ? Number(value) : LETTERS.indexOf(value);
      choose(row, kind, said);
    }
    return render();
  }

  function chooseAnother() {
    if (task) change(() => answers.chooseAnother());
    return render();
  }

  function noValidPair() {
    if (task) change(() => answers.noValidPair());
    return render();
  }

  function toggleWorse(position) {
    const index = answers.toConfirm()[position];
    if (index === undefined) return;
    const a = answers.rows[index];
    a.confirmed = a.confirmed === false ? null : false;
    saveDraft();
  }

  function markWorse(marked) {
    if (task) answers.toConfirm().forEach((i, n) => { answers.rows[i].confirmed = marked.includes(String(n + 1)) ? false : null; });
    return render();
  }

  const confirm = () => submit();

  function openPanel(name) {
    if (task && !busy && !revising && body().mode !== "feedback") body().mode = name;
    return render();
  }

  function closePanels() {
    if (body().mode !== "feedback") body().mode = "";
    return render();
  }

  function toggle(name) {
    const other = name === "help" ? "guide" : "help";
    body()[other] = "";
    body()[name] = body()[name] ? "" : "1";
    return render();
  }

  function switchLanguage() {
    site.switchLanguage();
    status = "";
    return renderAll();
  }

  function switchTheme() {
    site.switchTheme();
    return renderAll();
  }

  function toFlagged() {
    site.go("/flags/");
    return render();
  }

  // Heard at once and not through Gradio: a value that comes back late would undo what was typed meanwhile.
  function noted(event) {
    if (event.target !== noteField()) return;
    note = event.target.value;
    saveDraft();
  }

  const noteField = () => document.querySelector("#note input, #note textarea");

  async function signOut() {
    await drafts.forget();
    await call("/api/logout", {});
    site.go("/login");
    return render();
  }

  async function start(numView, numWords) {
    me = await site.start();
    body().role = me.role;
    guides[me.guideline_version] = me.guide;
    outbox = new Outbox(me.id, (sent) => call("/api/submit", sent), told);
    await outbox.flush(); // what an earlier page could not send goes before anything new
    if (!task) await nextTask();
    const [view, texts] = [render(), renderWords()];
    if (view.length !== numView || texts.length !== numWords)
      throw new Error(`the page has ${numView} + ${numWords} outputs, the script ${view.length} + ${texts.length}`);
    document.addEventListener("keydown", onKey, true);
    document.addEventListener("input", noted, true);
    document.addEventListener("pointerdown", (event) => {
      const row = event.target.closest?.(".dimension[id]");
      if (row && answers) answers.active = Math.min(Number(row.id.slice(4)), answers.rows.length - 1);
    });
    window.addEventListener("resize", fit);
    window.addEventListener("pagehide", () => {
      if (task) drafts.keep(draftName(), draft());
      drafts.flush(true);
    });
    setInterval(async () => {
      if (!task && !busy && !document.hidden) {
        await move(nextTask);
        refresh();
      }
    }, POLL_MS);
    return [...view, ...texts];
  }

  window.reelhf = {
    start, render, picked, chooseAnother, noValidPair, markWorse, confirm, submit, back, openPanel, closePanels, skip, flag, goOn,
    toggle, toFlagged, switchLanguage, switchTheme, signOut,
    times: () => player.videos.map((v) => v.currentTime), // for tests of the drift
  };
})();
