// K clips on one clock, the only custom HTML of the page: play, step, speed, loop, zoom, and how much of each clip was watched.
(() => {
  "use strict";
  const HARD_SEEK_SECONDS = 0.12; // a clip further off the master clock than this is moved, not nudged
  const NUDGE_SECONDS = 0.015;
  const NUDGE = 0.1; // of the playback rate
  const RATES = [0.25, 0.5, 1, 1.5, 2];
  const MAX_JUMP_SECONDS = 0.5; // a longer one was a seek, not watching

  function element(tag, className = "", text = "") {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text) made.textContent = text;
    return made;
  }

  function ready(video) {
    return new Promise((resolve) => {
      if (video.readyState >= 4) resolve();
      for (const name of ["canplaythrough", "error"]) video.addEventListener(name, resolve, { once: true });
    });
  }

  class Player {
    // say: (name, values) -> text; changed: called when sizes or what was watched changed; broken: called with a clip's letter.
    constructor(say, changed, broken) {
      Object.assign(this, { say, changed, broken, videos: [], watched: [], at: [], playing: false, rate: 1, loop: true });
      Object.assign(this, { timer: null, fps: 8, zoomed: -1, view: null });
    }

    show(view, watched) {
      const box = document.getElementById("player");
      box.replaceChildren();
      Object.assign(this, { view, fps: view.fps, rate: 1, zoomed: -1 });
      document.body.dataset.zoom = "";
      this.watched = view.clips.map((_, i) => watched?.[i] || 0);
      this.at = view.clips.map(() => 0);
      this.stage = element("div", "stage");
      if (view.first_frame_url) this.stage.append(this.firstFrame(view.first_frame_url));
      this.videos = view.clips.map((clip, slot) => this.clip(clip, slot));
      this.live = element("span", "sr-only");
      this.live.setAttribute("aria-live", "polite");
      box.append(this.stage, this.controls(), this.live);
      this.translate();
      this.playing = true;
      Promise.all(this.videos.map(ready)).then(() => {
        if (this.videos.length && this.view === view && this.playing) this.play();
      });
    }

    firstFrame(url) {
      const figure = element("figure", "first-frame"), picture = element("img");
      picture.src = url;
      figure.append(picture, element("figcaption"));
      return figure;
    }

    clip(clip, slot) {
      const figure = element("figure"), video = element("video"), seen = element("span", "seen");
      figure.dataset.slot = slot;
      figure.dataset.letter = clip.letter;
      Object.assign(video, { src: clip.url, muted: true, playsInline: true, preload: "auto", disablePictureInPicture: true });
      video.addEventListener("click", () => this.toggle());
      video.addEventListener("dblclick", () => this.zoom(this.zoomed === slot ? -1 : slot));
      video.addEventListener("loadedmetadata", () => this.changed());
      video.addEventListener("error", () => {
        if (!video.getAttribute("src")) return;
        figure.dataset.broken = "1";
        this.broken(clip.letter);
      });
      figure.append(video, element("figcaption", "", clip.letter), element("span", "mark"), seen);
      this.stage.append(figure);
      return video;
    }

    controls() {
      const bar = element("div", "controls");
      const button = (name, text, act) => {
        const made = element("button", name, text);
        made.type = "button";
        made.addEventListener("click", () => { act(); made.blur(); });
        bar.append(made);
        return made;
      };
      this.buttons = {
        play: button("play", "", () => this.toggle()),
        frame_back: button("frame", "‹ ,", () => this.step(-1)),
        frame_forward: button("frame", ". ›", () => this.step(1)),
      };
      this.scrubber = element("input", "scrub");
      Object.assign(this.scrubber, { type: "range", min: 0, max: 1000, value: 0 });
      this.scrubber.addEventListener("input", () => {
        this.pause();
        this.seek((this.scrubber.value / 1000) * this.duration());
      });
      this.clock = element("span", "clock");
      bar.append(this.scrubber, this.clock);
      this.buttons.speed = button("speed", "1×", () => this.faster(1, true));
      this.buttons.loop = button("loop", "⟳ l", () => this.setLoop(!this.loop));
      this.buttons.zoom = button("zoom", "⤢ z", () => this.zoomNext());
      return bar;
    }

    // Every word the player shows, in the present language.
    translate() {
      if (!this.stage) return;
      document.getElementById("player").setAttribute("aria-label", this.say("position"));
      this.stage.querySelectorAll("figure").forEach((figure) => {
        const letter = figure.dataset.letter;
        const name = letter ? this.say("clip", { clip: letter }) : this.say("first_frame");
        figure.querySelector("video, img").setAttribute(letter ? "aria-label" : "alt", name);
        if (!letter) figure.querySelector("figcaption").textContent = name;
        figure.dataset.trouble = this.say("does_not_play");
      });
      this.scrubber.setAttribute("aria-label", this.say("position"));
      for (const [name, made] of Object.entries(this.buttons)) {
        if (name === "play") continue;
        made.title = this.say(name);
        made.setAttribute("aria-label", this.say(name));
      }
      this.buttons.loop.setAttribute("aria-pressed", this.loop);
      this.paint();
    }

    announce(text) { if (this.live) this.live.textContent = text; }

    mark(slot, what) {
      const figure = this.stage?.querySelector(`figure[data-slot="${slot}"]`);
      if (!figure) return;
      figure.dataset.mark = what;
      figure.querySelector(".mark").textContent = what === "best" || what === "worst" ? this.say(`mark_${what}`) : "";
    }

    duration() {
      const length = this.videos[0]?.duration;
      return Number.isFinite(length) ? length : 0;
    }

    // Letters of the clips of which less than a fraction was seen; one that does not play cannot be.
    unseen(fraction) {
      return this.videos
        .map((video, i) => [video, i])
        .filter(([video, i]) => !video.error && this.watched[i] < fraction * (video.duration || Infinity))
        .map(([, i]) => this.view.clips[i].letter);
    }

    // As the server asks for it: null of a clip that does not play.
    watchedSeconds() {
      return this.videos.map((video, i) => (video.error ? null : Math.round(this.watched[i] * 10) / 10));
    }

    play() {
      if (!this.videos.length) return;
      this.playing = true;
      const ended = this.videos[0].ended || this.videos[0].currentTime >= this.duration() - 0.5 / this.fps;
      const start = ended ? 0 : this.videos[0].currentTime;
      this.videos.forEach((v, i) => {
        v.currentTime = start;
        v.playbackRate = this.rate;
        this.at[i] = start;
      });
      this.videos.forEach((v) => v.play().catch(() => {}));
      clearInterval(this.timer);
      this.timer = setInterval(() => this.tick(), 50);
      this.paint();
    }

    // Keeps every clip on the first one's clock, and starts all over together at the end.
    tick() {
      const [master, ...rest] = this.videos;
      if (!master) return;
      this.note();
      if (master.ended) {
        if (this.loop) this.play();
        else this.pause();
        return;
      }
      for (const video of rest) {
        if (video.readyState < 2 || video.ended) continue;
        const drift = video.currentTime - master.currentTime;
        if (Math.abs(drift) > HARD_SEEK_SECONDS) video.currentTime = master.currentTime;
        video.playbackRate = this.rate * (Math.abs(drift) < NUDGE_SECONDS ? 1 : drift > 0 ? 1 - NUDGE : 1 + NUDGE);
      }
      this.paint();
    }

    // Counts what was played before the viewer's eyes: not in a hidden tab, not behind a zoomed clip.
    note() {
      let grown = false;
      this.videos.forEach((video, i) => {
        const passed = video.currentTime - this.at[i];
        this.at[i] = video.currentTime;
        const visible = !document.hidden && (this.zoomed < 0 || this.zoomed === i);
        if (!this.playing || !visible || passed <= 0 || passed > MAX_JUMP_SECONDS * Math.max(1, this.rate)) return;
        const before = Math.floor(10 * this.watched[i]);
        this.watched[i] += passed;
        grown ||= Math.floor(10 * this.watched[i]) > before;
      });
      if (grown) this.changed();
    }

    pause() {
      this.playing = false;
      clearInterval(this.timer);
      this.videos.forEach((v) => v.pause());
      this.paint();
    }

    stop() {
      this.pause();
      this.videos.forEach((v) => v.removeAttribute("src"));
      this.videos = [];
    }

    toggle() {
      if (this.playing) this.pause();
      else this.play();
    }

    seek(seconds) {
      this.videos.forEach((v, i) => {
        v.currentTime = seconds;
        this.at[i] = seconds;
      });
      this.paint(seconds);
    }

    // To the middle of a frame: its edge can show either neighbour.
    step(frames) {
      this.pause();
      if (!this.videos.length) return;
      const last = Math.max(0, Math.round(this.duration() * this.fps) - 1);
      const current = Math.floor(this.videos[0].currentTime * this.fps + 1e-3);
      this.seek((Math.min(last, Math.max(0, current + frames)) + 0.5) / this.fps);
    }

    faster(by, around = false) {
      const next = RATES.indexOf(this.rate) + by;
      this.rate = around ? RATES[next % RATES.length] : RATES[Math.min(RATES.length - 1, Math.max(0, next))];
      this.videos.forEach((v) => { v.playbackRate = this.rate; });
      if (this.buttons) this.buttons.speed.textContent = `${this.rate}×`;
    }

    setLoop(on) {
      this.loop = on;
      this.buttons?.loop.setAttribute("aria-pressed", on);
      if (on && this.videos[0]?.ended) this.play();
    }

    zoomNext() { this.zoom(this.zoomed + 1 >= this.videos.length ? -1 : this.zoomed + 1); }

    zoom(slot) {
      this.zoomed = slot;
      document.body.dataset.zoom = this.stage.dataset.zoomed = slot < 0 ? "" : "1";
      this.stage.querySelectorAll("figure").forEach((figure) => {
        figure.dataset.zoomed = Number(figure.dataset.slot) === slot ? "1" : "";
      });
      this.changed();
    }

    // What a key does to the clips; undefined if nothing.
    command({ code }) {
      return {
        Digit0: () => this.seek(0),
        Numpad0: () => this.seek(0),
        KeyZ: () => this.zoomNext(),
        KeyL: () => this.setLoop(!this.loop),
        Minus: () => this.faster(-1),
        Equal: () => this.faster(1),
        Space: () => this.toggle(),
        Comma: () => this.step(-1),
        Period: () => this.step(1),
      }[code];
    }

    paint(at) {
      if (!this.buttons) return;
      const seconds = at ?? this.videos[0]?.currentTime ?? 0;
      this.buttons.play.textContent = this.say(this.playing ? "pause" : "play");
      this.scrubber.value = this.duration() ? (seconds / this.duration()) * 1000 : 0;
      this.clock.textContent = `${seconds.toFixed(1)} / ${this.duration().toFixed(1)} s`;
      this.stage.querySelectorAll(".seen").forEach((bar, i) => {
        const length = this.videos[i]?.duration || Infinity;
        bar.style.width = `${Math.min(100, (100 * this.watched[i]) / length)}%`;
      });
    }
  }

  window.reelhfParts = { ...window.reelhfParts, Player };
})();
