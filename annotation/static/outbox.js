// Answers wait in the browser until the server has confirmed them. An answer and its key stay until then, so that a lost network
// or a closed page loses nothing and sending twice stores once.
(() => {
  "use strict";
  const { storage: { read, write, remove, keys } } = window.reelhfParts;
  const PAUSES_MS = [1000, 2000, 4000, 8000, 15000, 30000];
  const FINAL = new Set([400, 404, 409, 413, 422]); // asking again would not help

  // One person's answers on their way. `send` is asked for each, oldest first; `told` hears what became of it.
  class Outbox {
    constructor(owner, send, told) {
      Object.assign(this, { owner, send, told, tries: 0, timer: null, busy: null });
      window.addEventListener("online", () => this.flush());
    }

    // Each answer is an entry of its own: two tabs never overwrite each other's.
    entries() {
      return keys(`outbox:${this.owner}:`).map((key) => ({ key, ...read(key) })).sort((a, b) => a.at - b.at);
    }

    get waiting() { return this.entries().length; }

    add(body) {
      write(`outbox:${this.owner}:${body.idempotency_key}`, { at: Date.now(), body });
      this.tries = 0;
      return this.flush();
    }

    flush() {
      this.busy ??= this.run().finally(() => { this.busy = null; });
      return this.busy;
    }

    async run() {
      clearTimeout(this.timer);
      for (const entry of this.entries()) {
        const became = await this.sent(entry);
        if (became.kept) this.timer = setTimeout(() => this.flush(), Math.max(became.wait, this.pause()));
        else remove(entry.key);
        await this.told({ ...became, body: entry.body });
        if (became.kept) return;
        this.tries = 0;
      }
    }

    pause() { return PAUSES_MS[Math.min(this.tries++, PAUSES_MS.length - 1)]; }

    // `wait`: milliseconds that a busy server asks for.
    async sent(entry) {
      try {
        return { receipt: await this.send(entry.body) };
      } catch (error) {
        return FINAL.has(error.status) ? { error } : { kept: true, wait: error.wait || 0 };
      }
    }
  }

  window.reelhfParts = { ...window.reelhfParts, Outbox };
})();
