// Half-finished answers: in this browser at once, on the server a little later, so that another computer can go on with them.
(() => {
  "use strict";
  const { storage: { read, write, remove, keys } } = window.reelhfParts;
  const MAX_DRAFTS = 20;
  const [QUIET_MS, LONGEST_MS] = [2000, 15000]; // sent after so long without a change, and at the latest

  class Drafts {
    // send: (presentation, text, leaving) -> promise; now: the server's time in milliseconds, which all browsers share.
    constructor(send, now) {
      Object.assign(this, { send, now, timer: null, unsent: null, since: 0, newest: 0 });
    }

    // What was changed.
    save(name, presentation, draft) {
      this.newest = Math.max(this.now(), this.newest + 1); // whatever the clocks say, it follows what it was made of
      const kept = this.keep(name, draft);
      if (this.unsent?.name !== name) this.flush();
      if (!this.unsent) this.since = Date.now();
      this.unsent = { name, presentation, text: JSON.stringify({ ...kept, name }) };
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.flush(), Math.max(0, Math.min(QUIET_MS, this.since + LONGEST_MS - Date.now())));
    }

    // Here alone and no newer than before, so that another computer's changes still win.
    keep(name, draft) {
      const kept = { ...draft, at: this.newest };
      write(`draft:${name}`, kept);
      const old = keys("draft:").map((k) => [read(k)?.at || 0, k]).sort((a, b) => b[0] - a[0]).slice(MAX_DRAFTS);
      old.forEach(([, k]) => remove(k));
      return kept;
    }

    // The newer one of what this browser and the server know.
    load(name, remote) {
      const here = read(`draft:${name}`);
      let there = null;
      try {
        there = JSON.parse(remote || "null");
      } catch { /* a program wrote it, for itself */ }
      const found = there?.name === name && there.at > (here?.at || 0) ? there : here;
      this.newest = found?.at || 0;
      return found;
    }

    // One that gets lost is sent again with the next change.
    async flush(leaving = false) {
      clearTimeout(this.timer);
      const { unsent } = this;
      this.unsent = null;
      if (unsent) await this.send(unsent.presentation, unsent.text, leaving).catch(() => {});
    }

    drop(name) {
      if (this.unsent?.name === name) this.unsent = null;
      remove(`draft:${name}`);
    }

    // The server keeps what there is; this browser, which others may use, does not.
    async forget() {
      await this.flush();
      keys("draft:").forEach(remove);
    }
  }

  window.reelhfParts = { ...window.reelhfParts, Drafts };
})();
