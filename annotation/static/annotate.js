// The state of one task and everything the page does. Gradio components call in through `window.reelhf.*`; each call returns the
// new value of every component, in the order of `view` in annotation/app.py. Prompts and notes are only ever set as text.
(() => {
  "use strict";
  const LETTERS = "ABCDEF";
  const ROWS = 5;
  const HARD_SEEK_SECONDS = 0.12; // a clip further off the master clock than this is moved, not nudged
  const NUDGE_SECONDS = 0.015;
  const NUDGE = 0.1; // of the playback rate
  const WORST_KEYS = ["KeyQ", "KeyW", "KeyE", "KeyR"];
  const RATES = [1, 0.5, 0.25];
  const [MIN_PIXELS, MAX_PIXELS, VETO_PIXELS] = [150, 560, 61]; // heights of a clip and of the veto line
  const [GAP_PIXELS, NARROW_PIXELS] = [12, 900];

  const SCRIPT = "/annotate/annotate.js";
  const ROOT = (document.querySelector(`script[src$="${SCRIPT}"]`)?.getAttribute("src") || SCRIPT).slice(0, -SCRIPT.length);

  let me = null;
  let task = null;
  let answers = [];
  let active = 0;
  let shownAt = 0;
  let playedSeconds = 0;
  let note = "";
  let status = "";
  let progress = null;
  let busy = false;
  let heartbeat = null;

  // --- the server -------------------------------------------------------------------------------

  async function call(path, body) {
    const options = body === undefined ? {} : {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": me.csrf },
      body: JSON.stringify(body),
    };
    const answer = await fetch(ROOT + path, { ...options, credentials: "same-origin" });
    if (answer.status === 401) {
      window.location.assign(`${ROOT}/login`);
      return new Promise(() => {}); // the page is going away
    }
    const data = await answer.json();
    if (!answer.ok) {
      const error = new Error((data.problems || [data.detail]).map(readable).join(". "));
      error.status = answer.status;
      throw error;
    }
    return data;
  }

  const readable = (text) =>
    Object.values(task?.questions || {}).reduce((t, q) => t.replaceAll(q.dimension, q.label), String(text));

  // --- drafts: an answer survives a reload, and its key survives until the server confirms it ------

  const draftKey = () => `reelhf:draft:${task.presentation}`;

  function saveDraft() {
    try {
      localStorage.setItem(draftKey(), JSON.stringify({ answers, active, note, key: task.key }));
    } catch { /* private mode: the draft lives in memory only */ }
  }

  function clearDrafts() {
    try {
      Object.keys(localStorage).filter((k) => k.startsWith("reelhf:draft:")).forEach((k) => localStorage.removeItem(k));
    } catch { /* nothing was stored */ }
  }

  function loadDraft() {
    try {
      return JSON.parse(localStorage.getItem(draftKey()) || "null");
    } catch {
      return null;
    }
  }

  // --- one task ---------------------------------------------------------------------------------

  const blank = () => ({ best: null, worst: null, status: null, first: null, constrained: false, veto: null });

  async function nextTask() {
    const view = (await call("/api/claim", {})).task;
    progress = await call("/api/progress");
    task = view;
    clearInterval(heartbeat);
    player.stop();
    document.body.dataset.state = task ? "work" : "done";
    if (!task) {
      clearDrafts();
      return;
    }
    const draft = loadDraft();
    answers = draft?.answers?.length === task.dimensions.length ? draft.answers : task.dimensions.map(blank);
    active = draft ? Math.min(draft.active, answers.length - 1) : 0;
    note = draft?.note || "";
    task.key = draft?.key || randomKey();
    shownAt = performance.now();
    playedSeconds = 0;
    document.body.dataset.k = task.clips.length;
    document.body.dataset.dims = task.dimensions.length;
    player.show(task);
    heartbeat = setInterval(beat, Math.max(5, task.lease_seconds / 3) * 1000);
  }

  async function beat() {
    if (document.hidden || !task) return;
    try {
      const { leased } = await call("/api/heartbeat", { presentation: task.presentation });
      if (!leased) say("This task was idle for long and may have gone to someone else. You can still submit it.");
    } catch { /* the next beat tries again */ }
  }

  const randomKey = () => Array.from(crypto.getRandomValues(new Uint8Array(18)), (b) => b.toString(16).padStart(2, "0")).join("");

  // --- admissibility (the server checks again) -----------------------------------------------------

  const complete = (a) => a.best !== null && a.worst !== null;
  const settled = (a) => complete(a) && !a.status && !a.veto;
  const answered = (a) => Boolean(a.status) || (complete(a) && !a.veto);
  const clash = (a, b) => a[0] === b[1] || a[1] === b[0];
  const pair = (a) => [a.best, a.worst];
  const label = (i) => task.questions[task.dimensions[i]].label;

  function clashOf(index, candidate) {
    return answers.findIndex((other, i) => i !== index && settled(other) && clash(candidate, pair(other)));
  }

  function reasonFor(index, other) {
    const a = answers[index], b = answers[other], parts = [];
    if (a.best === b.worst) parts.push(`**${LETTERS[a.best]}** is your best for *${label(index)}* but your worst for *${label(other)}*`);
    if (a.worst === b.best) parts.push(`**${LETTERS[a.worst]}** is your worst for *${label(index)}* but your best for *${label(other)}*`);
    return parts.join(", and ");
  }

  function openPairs(index) {
    const found = [];
    for (let best = 0; best < task.clips.length; best++)
      for (let worst = 0; worst < task.clips.length; worst++)
        if (best !== worst && clashOf(index, [best, worst]) < 0) found.push([best, worst]);
    return found;
  }

  // Checks the row that was just changed, then frees the rows whose reason for a veto has gone.
  function settle(index) {
    const a = answers[index];
    a.veto = null;
    if (complete(a) && !a.status) {
      if (!a.constrained) a.first = pair(a); // the free pick: kept whatever the rule says next
      const other = clashOf(index, pair(a));
      if (other >= 0) {
        a.veto = { other, reason: reasonFor(index, other) };
        a.constrained = true;
      }
    }
    answers.forEach((row, i) => {
      if (i === index || !row.first) return;
      const free = clashOf(i, row.first) < 0;
      if (row.veto && complete(row)) {
        const other = clashOf(i, pair(row));
        row.veto = other < 0 ? null : { other, reason: reasonFor(i, other) };
        if (!row.veto && String(pair(row)) === String(row.first)) row.constrained = false;
      } else if (row.status === "no_valid_pair" && free) {
        Object.assign(row, { best: row.first[0], worst: row.first[1], status: null, constrained: false });
      }
    });
  }

  function choose(index, kind, slot) {
    const a = answers[index];
    if (kind !== "status" && slot >= task.clips.length) return;
    // Changing a pick because another row was vetoed by it is no longer a free choice.
    const blamed = answers.some((row) => row.veto && row.veto.other === index);
    if (blamed && settled(a)) a.constrained = true;
    status = "";
    if (kind === "status") {
      Object.assign(a, { best: null, worst: null, status: slot });
      if (!a.constrained) a.first = null;
    } else {
      a.status = null;
      a[kind] = slot;
      const opposite = kind === "best" ? "worst" : "best";
      if (a[opposite] === slot) a[opposite] = null;
    }
    settle(index);
    active = index;
    if (answered(a)) {
      const next = answers.findIndex((row) => !answered(row));
      if (next >= 0) active = next;
    }
    saveDraft();
  }

  function payload() {
    return task.dimensions.map((dimension, i) => {
      const a = answers[i], state = a.status || "ok";
      return {
        dimension,
        status: state,
        best: state === "ok" ? a.best : null,
        worst: state === "ok" ? a.worst : null,
        first_best: a.first ? a.first[0] : null,
        first_worst: a.first ? a.first[1] : null,
        constrained: a.constrained && state !== "no_valid_pair",
      };
    });
  }

  function missing() {
    for (let i = 0; i < answers.length; i++) {
      const a = answers[i];
      if (a.veto) return [i, `${label(i)} has a pair that clashes with ${label(a.veto.other)}`];
      if (!answered(a)) {
        const what = a.best === null && a.worst === null ? "an answer" : a.best === null ? "a best clip" : "a worst clip";
        return [i, `${label(i)} still needs ${what}`];
      }
    }
    return null;
  }

  // --- showing ----------------------------------------------------------------------------------

  function say(text) {
    status = text;
    refresh();
  }

  function refresh() {
    document.getElementById("refresh")?.click();
  }

  const minutes = (seconds) =>
    seconds < 90 ? `${Math.max(10, Math.round(seconds / 10) * 10)} s` : `${Math.round(seconds / 60)} min`;

  function progressText() {
    if (!progress) return "";
    const left = progress.wanted - progress.judged;
    if (!task) return `**${progress.judged}** judged`;
    let text = `**${progress.judged}** of ${progress.wanted} judged`;
    if (left <= 0) return `${text}: all that was asked. Thank you! You may go on.`;
    if (progress.eta_seconds !== null) text += ` · about ${minutes(progress.eta_seconds)} left`;
    return text;
  }

  function render() {
    const fill = (make) => Array.from({ length: ROWS }, (_, i) => (task && i < answers.length ? make(answers[i], i) : null));
    const letter = (slot) => (slot === null ? null : LETTERS[slot]);
    const question = (_, i) => {
      const q = task.questions[task.dimensions[i]];
      return `**${q.label}** ${q.question}\n\n${q.help}`;
    };
    const vetoed = answers.findIndex((a) => a.veto);
    let vetoText = "";
    if (task && vetoed >= 0) {
      vetoText = `${answers[vetoed].veto.reason}. A clip cannot be both.`;
      if (!openPairs(vetoed).length) vetoText += " No other pair is open.";
    }
    decorate(vetoed);
    return [
      task ? task.prompt : "",
      progressText(),
      ...fill(question),
      ...fill((a) => letter(a.best)),
      ...fill((a) => letter(a.worst)),
      ...fill((a) => (a.status === "no_valid_pair" ? null : a.status)),
      vetoText,
      note,
      status,
    ];
  }

  // Marks that no Gradio property carries: the active row, blocked letters, and the rings around the clips.
  function decorate(vetoed) {
    document.body.dataset.veto = vetoed >= 0 ? "1" : "";
    document.documentElement.style.setProperty(
      "--done-fraction", progress && progress.wanted ? Math.min(1, progress.judged / progress.wanted) : 0);
    for (let i = 0; i < ROWS; i++) {
      const row = document.getElementById(`row-${i}`);
      const a = answers[i];
      if (!row || !task || !a) continue;
      row.dataset.active = i === active ? "1" : "";
      row.dataset.state = a.veto ? "veto" : a.status === "no_valid_pair" ? "none" : answered(a) ? "ok" : "";
      for (const kind of ["best", "worst"]) {
        row.querySelectorAll(`.${kind} label`).forEach((element, slot) => {
          const trial = kind === "best" ? [slot, -1] : [-1, slot];
          element.dataset.blocked = a.constrained && clashOf(i, trial) >= 0 ? "1" : "";
        });
      }
    }
    const marked = answers[vetoed >= 0 ? vetoed : active];
    document.querySelectorAll("#player figure[data-slot]").forEach((figure) => {
      const slot = Number(figure.dataset.slot);
      figure.dataset.mark = !marked ? "" : marked.best === slot ? "best" : marked.worst === slot ? "worst" : "";
    });
    const submit = document.getElementById("submit");
    if (submit) submit.dataset.ready = task && !missing() ? "1" : "";
    requestAnimationFrame(fit);
    const done = document.getElementById("done");
    if (done && document.body.dataset.state === "done") {
      done.textContent = progress && progress.judged
        ? `Nothing is left to judge. You judged ${progress.judged}. Thank you!`
        : "There is nothing to judge yet. This page looks again every minute.";
    }
  }

  // The clips get all the height the rest of the page leaves, so that a task never needs scrolling; the veto line has its place kept.
  function fit() {
    const stage = document.querySelector("#player .stage");
    const video = stage?.querySelector("video");
    if (!task || !video || window.innerWidth <= NARROW_PIXELS) return;
    const bottom = Math.max(...["actions", "skip-panel"].map((id) => document.getElementById(id).getBoundingClientRect().bottom));
    const rest = bottom + window.scrollY - stage.getBoundingClientRect().height;
    const kept = document.body.dataset.veto || document.body.dataset.mode === "skip" ? 0 : VETO_PIXELS;
    const aspect = video.videoWidth ? video.videoWidth / video.videoHeight : 1;
    const count = stage.children.length;
    const whole = (stage.clientWidth - GAP_PIXELS * (count - 1)) / count / aspect;
    const height = Math.max(MIN_PIXELS, Math.min(window.innerHeight - rest - kept - 14, whole, MAX_PIXELS));
    stage.style.setProperty("--clip-height", `${Math.floor(height)}px`);
    stage.style.setProperty("--clip-width", `${Math.floor(height * aspect)}px`);
  }

  // --- the player: one master clock ----------------------------------------------------------------

  const player = {
    videos: [],
    playing: false,
    rate: 1,
    timer: null,
    fps: 8,
    last: 0,

    show(view) {
      const box = document.getElementById("player");
      box.replaceChildren();
      this.fps = view.fps;
      this.rate = 1;
      const stage = element("div", "stage");
      if (view.first_frame_url) {
        const figure = element("figure", "first-frame");
        const picture = element("img");
        picture.src = view.first_frame_url;
        picture.alt = "The given first frame";
        figure.append(picture, element("figcaption", "", "First frame"));
        stage.append(figure);
      }
      this.videos = view.clips.map((clip, slot) => {
        const figure = element("figure");
        figure.dataset.slot = slot;
        const video = element("video");
        Object.assign(video, { src: clip.url, muted: true, playsInline: true, preload: "auto", disablePictureInPicture: true });
        video.setAttribute("aria-label", `Clip ${clip.letter}`);
        video.addEventListener("click", () => this.toggle());
        video.addEventListener("loadedmetadata", fit);
        video.addEventListener("error", () => {
          figure.dataset.broken = "1";
          say(`Clip ${clip.letter} does not play. Skip the task with the reason “a clip is broken”.`);
        });
        figure.append(video, element("figcaption", "", clip.letter), element("span", "mark"));
        stage.append(figure);
        return video;
      });
      box.append(stage, this.controls());
      this.playing = true;
      Promise.all(this.videos.map(ready)).then(() => {
        if (this.videos.length && task === view && this.playing) this.play();
      });
    },

    controls() {
      const bar = element("div", "controls");
      this.button = element("button", "play", "Pause");
      this.button.addEventListener("click", () => this.toggle());
      this.scrubber = element("input", "scrub");
      Object.assign(this.scrubber, { type: "range", min: 0, max: 1000, value: 0 });
      this.scrubber.setAttribute("aria-label", "Position in the clips");
      this.scrubber.addEventListener("input", () => {
        this.pause();
        this.seek((this.scrubber.value / 1000) * this.duration());
      });
      this.clock = element("span", "clock");
      const back = element("button", "", "‹ ,");
      back.title = "One frame back";
      back.addEventListener("click", () => this.step(-1));
      const forward = element("button", "", ". ›");
      forward.title = "One frame forward";
      forward.addEventListener("click", () => this.step(1));
      this.speed = element("button", "speed", "1×");
      this.speed.title = "Speed";
      this.speed.addEventListener("click", () => this.slower());
      bar.append(this.button, back, forward, this.scrubber, this.clock, this.speed);
      bar.querySelectorAll("button").forEach((b) => b.addEventListener("click", () => b.blur()));
      return bar;
    },

    duration() {
      const length = this.videos[0]?.duration;
      return Number.isFinite(length) ? length : 0;
    },

    play() {
      if (!this.videos.length) return;
      this.playing = true;
      const start = this.videos[0].ended || this.videos[0].currentTime >= this.duration() - 0.5 / this.fps ? 0 : this.videos[0].currentTime;
      this.videos.forEach((v) => {
        v.currentTime = start;
        v.playbackRate = this.rate;
      });
      this.videos.forEach((v) => v.play().catch(() => {}));
      this.last = performance.now();
      clearInterval(this.timer);
      this.timer = setInterval(() => this.tick(), 50);
      this.paint();
    },

    // Keeps every clip on the first one's clock, and starts all over together at the end.
    tick() {
      const now = performance.now();
      if (this.playing && !document.hidden) playedSeconds += (now - this.last) / 1000;
      this.last = now;
      const [master, ...rest] = this.videos;
      if (!master) return;
      if (master.ended) {
        this.play();
        return;
      }
      for (const video of rest) {
        if (video.readyState < 2 || video.ended) continue;
        const drift = video.currentTime - master.currentTime;
        if (Math.abs(drift) > HARD_SEEK_SECONDS) video.currentTime = master.currentTime;
        video.playbackRate = this.rate * (Math.abs(drift) < NUDGE_SECONDS ? 1 : drift > 0 ? 1 - NUDGE : 1 + NUDGE);
      }
      this.paint();
    },

    pause() {
      this.playing = false;
      clearInterval(this.timer);
      this.videos.forEach((v) => v.pause());
      this.paint();
    },

    stop() {
      this.pause();
      this.videos.forEach((v) => v.removeAttribute("src"));
      this.videos = [];
    },

    toggle() {
      if (this.playing) this.pause();
      else this.play();
    },

    seek(seconds) {
      this.videos.forEach((v) => { v.currentTime = seconds; });
      this.paint(seconds);
    },

    // To the middle of a frame: its edge can show either neighbour.
    step(frames) {
      this.pause();
      if (!this.videos.length) return;
      const last = Math.max(0, Math.round(this.duration() * this.fps) - 1);
      const current = Math.floor(this.videos[0].currentTime * this.fps + 1e-3);
      this.seek((Math.min(last, Math.max(0, current + frames)) + 0.5) / this.fps);
    },

    slower() {
      this.rate = RATES[(RATES.indexOf(this.rate) + 1) % RATES.length];
      this.videos.forEach((v) => { v.playbackRate = this.rate; });
      this.speed.textContent = `${this.rate}×`;
    },

    paint(at) {
      if (!this.button) return;
      const seconds = at ?? this.videos[0]?.currentTime ?? 0;
      this.button.textContent = this.playing ? "Pause" : "Play";
      this.scrubber.value = this.duration() ? (seconds / this.duration()) * 1000 : 0;
      this.clock.textContent = `${seconds.toFixed(1)} / ${this.duration().toFixed(1)} s`;
    },
  };

  function ready(video) {
    return new Promise((resolve) => {
      if (video.readyState >= 4) resolve();
      for (const name of ["canplaythrough", "error"]) video.addEventListener(name, resolve, { once: true });
    });
  }

  function element(tag, className = "", text = "") {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text) made.textContent = text;
    return made;
  }

  // --- keys -------------------------------------------------------------------------------------

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    const typing = target.tagName === "TEXTAREA" || (target.tagName === "INPUT" && !["radio", "range", "checkbox"].includes(target.type));
    if (event.code === "Escape") {
      target.blur();
      document.body.dataset.help = "";
      closePanels();
      refresh();
      return;
    }
    if (typing && !target.readOnly && !target.disabled) return;
    if (target.tagName === "BUTTON" && (event.code === "Space" || event.code === "Enter")) return;
    const does = command(event);
    if (!does) return;
    event.preventDefault();
    event.stopPropagation();
    if (document.activeElement && document.activeElement !== document.body) document.activeElement.blur();
    does();
  }

  function command(event) {
    const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1];
    if (event.key === "?") return () => { toggleHelp(); };
    if (!task || busy) return null;
    if (document.body.dataset.mode === "skip") {
      const reason = digit && me.skip_reasons[Number(digit) - 1];
      return reason ? () => skip(reason).then(refresh) : null;
    }
    const act = (work) => () => { work(); refresh(); };
    if (digit === "0") return () => player.seek(0);
    if (digit && digit <= task.clips.length)
      return act(() => choose(active, event.shiftKey ? "worst" : "best", Number(digit) - 1));
    const worst = WORST_KEYS.indexOf(event.code);
    if (worst >= 0) return act(() => choose(active, "worst", worst));
    switch (event.code) {
      case "KeyT": return act(() => choose(active, "status", "tie"));
      case "KeyU": return act(() => choose(active, "status", "cannot_judge"));
      case "KeyN": case "ArrowDown": return act(() => { active = (active + 1) % answers.length; });
      case "KeyP": case "ArrowUp": return act(() => { active = (active + answers.length - 1) % answers.length; });
      case "KeyC": return act(chooseAnother);
      case "KeyX": return act(noValidPair);
      case "KeyS": return act(openSkip);
      case "KeyM": return () => noteField()?.focus();
      case "Space": return () => player.toggle();
      case "Comma": return () => player.step(-1);
      case "Period": return () => player.step(1);
      case "Enter": case "NumpadEnter": return () => submit().then(refresh);
      default: return null;
    }
  }

  // --- what the components call -------------------------------------------------------------------

  function picked(row, kind, value) {
    if (task && !busy && row < answers.length && value !== null && value !== undefined)
      choose(row, kind, kind === "status" ? value : LETTERS.indexOf(value));
    return render();
  }

  function chooseAnother() {
    const index = answers.findIndex((a) => a.veto);
    if (index < 0) return render();
    Object.assign(answers[index], { best: null, worst: null, veto: null, status: null });
    active = index;
    settle(index);
    saveDraft();
    return render();
  }

  function noValidPair() {
    const index = answers.findIndex((a) => a.veto);
    if (index < 0) return render();
    Object.assign(answers[index], { best: null, worst: null, veto: null, status: "no_valid_pair" });
    settle(index);
    const next = answers.findIndex((a) => !answered(a));
    active = next < 0 ? index : next;
    saveDraft();
    return render();
  }

  async function submit() {
    if (!task || busy) return render();
    const gap = missing();
    if (gap) {
      active = gap[0];
      status = `${gap[1]}.`;
      return render();
    }
    busy = true;
    status = "Saving…";
    try {
      const receipt = await call("/api/submit", {
        presentation: task.presentation,
        idempotency_key: task.key,
        verdict: {
          choices: payload(),
          note,
          seconds: (performance.now() - shownAt) / 1000,
          watched_seconds: task.clips.map(() => Math.round(playedSeconds * 10) / 10),
        },
      });
      clearDrafts();
      status = `Saved as #${receipt.judgment_id} at ${new Date(receipt.submitted_ms).toLocaleTimeString()}.`;
      const kept = status;
      await nextTask();
      status = kept;
    } catch (error) {
      if (error.status === 409) {
        clearDrafts();
        status = `${error.message}.`;
        await nextTask();
      } else {
        status = error.status === 422
          ? `Not saved: ${error.message}.`
          : "Not saved: the server cannot be reached. Your answers are kept here; press Enter to try again.";
      }
    } finally {
      busy = false;
    }
    return render();
  }

  function openSkip() {
    if (task) document.body.dataset.mode = "skip";
    return render();
  }

  function closePanels() {
    document.body.dataset.mode = "";
    return render();
  }

  async function skip(reason) {
    if (!task || busy || !reason) return render();
    busy = true;
    try {
      await call("/api/skip", { presentation: task.presentation, reason, note });
      document.body.dataset.mode = "";
      clearDrafts();
      await nextTask();
      status = "Skipped.";
    } catch (error) {
      status = `Not skipped: ${error.message}`;
    } finally {
      busy = false;
    }
    return render();
  }

  // Heard at once and not through Gradio: a value that comes back late would undo what was typed meanwhile.
  function noted(event) {
    if (event.target !== noteField()) return;
    note = event.target.value;
    if (task) saveDraft();
  }

  const noteField = () => document.querySelector("#note input, #note textarea");

  function toggleHelp() {
    document.body.dataset.help = document.body.dataset.help ? "" : "1";
    return render();
  }

  async function signOut() {
    clearDrafts();
    await call("/api/logout", {});
    window.location.assign(`${ROOT}/login`);
    return render();
  }

  async function start(outputs) {
    me = await call("/api/me");
    await nextTask();
    const values = render();
    if (values.length !== outputs) throw new Error(`the page has ${outputs} outputs, the script ${values.length}`);
    document.addEventListener("keydown", onKey, true);
    document.addEventListener("input", noted, true);
    document.addEventListener("pointerdown", (event) => {
      const row = event.target.closest?.(".dimension[id]");
      if (row) active = Number(row.id.slice(4));
    });
    window.addEventListener("resize", fit);
    document.addEventListener("visibilitychange", () => { player.last = performance.now(); });
    setInterval(async () => {
      if (!task && !document.hidden) {
        await nextTask();
        refresh();
      }
    }, 60000);
    return render();
  }

  window.reelhf = {
    start, render, picked, chooseAnother, noValidPair, submit, openSkip, closePanels, skip, toggleHelp, signOut,
    times: () => player.videos.map((v) => v.currentTime), // for tests of the drift
  };
})();
