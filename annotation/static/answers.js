// The answers to one task: picks, the admissibility rule (the server checks again), what is still missing, what is sent.
(() => {
  "use strict";
  const LETTERS = "ABCDEFGH";
  const blank = () => ({
    best: null, worst: null, status: null, first: null, constrained: false, veto: null, confirmed: null, scores: [],
  });
  const complete = (a) => a.best !== null && a.worst !== null;
  const clash = (a, b) => a[0] === b[1] || a[1] === b[0];
  const pair = (a) => [a.best, a.worst];

  class Answers {
    // say: (name, values) -> text; label: index -> what the dimension is called.
    constructor(task, say, label) {
      Object.assign(this, { task, say, label, rows: task.dimensions.map(blank), active: 0, clip: 0 });
    }

    get kind() { return this.task.kind; }
    get numClips() { return this.task.clips.length; }
    get current() { return this.rows[this.active]; }

    // A draft, or the answers that a revision starts from.
    restore(rows, active = 0, clip = 0) {
      if (rows?.length !== this.rows.length) return;
      this.rows = rows.map((row) => ({ ...blank(), ...row }));
      this.active = Math.min(active, rows.length - 1);
      this.clip = Math.min(clip, this.numClips - 1);
    }

    static fromVerdict(task, verdict) {
      const by = Object.fromEntries(verdict.choices.map((c) => [c.dimension, c]));
      return task.dimensions.map((dimension) => {
        const c = by[dimension];
        const scored = task.kind === "score" && c.scores;
        return {
          ...blank(),
          best: scored ? null : c.best,
          worst: scored ? null : c.worst,
          status: c.status === "ok" || scored ? null : c.status,
          first: c.first_best === null || scored ? null : [c.first_best, c.first_worst],
          constrained: c.constrained || c.status === "no_valid_pair",
          scores: c.scores ? [...c.scores] : [],
        };
      });
    }

    answered(a) {
      if (a.status) return true;
      if (this.kind === "score") return this.nextScore(a) < 0;
      return complete(a) && !a.veto;
    }

    nextScore(a) {
      return this.task.clips.findIndex((_, i) => a.scores[i] === undefined || a.scores[i] === null);
    }

    settled(a) { return complete(a) && !a.status && !a.veto; }

    clashOf(index, candidate) {
      if (this.kind !== "best_worst") return -1;
      return this.rows.findIndex((other, i) => i !== index && this.settled(other) && clash(candidate, pair(other)));
    }

    reasonFor(index, other) {
      const a = this.rows[index], b = this.rows[other], parts = [];
      const names = { dimension: this.label(index), other: this.label(other) };
      if (a.best === b.worst) parts.push(this.say("clash_best", { clip: LETTERS[a.best], ...names }));
      if (a.worst === b.best) parts.push(this.say("clash_worst", { clip: LETTERS[a.worst], ...names }));
      return parts.join(this.say("and"));
    }

    openPairs(index) {
      const found = [];
      for (let best = 0; best < this.numClips; best++)
        for (let worst = 0; worst < this.numClips; worst++)
          if (best !== worst && this.clashOf(index, [best, worst]) < 0) found.push([best, worst]);
      return found;
    }

    vetoed() { return this.rows.findIndex((a) => a.veto !== null); }

    // Checks the row that was just changed, then frees the rows whose reason for a veto has gone.
    settle(index) {
      const a = this.rows[index];
      a.veto = null;
      if (complete(a) && !a.status) {
        if (!a.constrained) a.first = pair(a); // the free pick: kept whatever the rule says next
        const other = this.clashOf(index, pair(a));
        if (other >= 0) {
          a.veto = other;
          a.constrained = true;
        }
      }
      this.rows.forEach((row, i) => {
        if (i === index || !row.first) return;
        if (row.veto !== null && complete(row)) {
          const other = this.clashOf(i, pair(row));
          row.veto = other < 0 ? null : other;
          if (row.veto === null && String(pair(row)) === String(row.first)) row.constrained = false;
        } else if (row.status === "no_valid_pair" && this.clashOf(i, row.first) < 0) {
          Object.assign(row, { best: row.first[0], worst: row.first[1], status: null, constrained: false });
        }
      });
    }

    choose(index, kind, slot) {
      const a = this.rows[index];
      if (kind !== "status" && kind !== "score" && slot >= this.numClips) return;
      // Changing a pick because another row was vetoed by it is no longer a free choice.
      const blamed = this.rows.some((row) => row.veto === index);
      if (blamed && this.settled(a)) a.constrained = true;
      this.rows.forEach((row) => { row.confirmed = null; });
      if (kind === "status") {
        Object.assign(a, { best: null, worst: null, status: slot, scores: [] });
        if (!a.constrained) a.first = null;
      } else if (kind === "score") {
        a.status = null;
        a.scores[this.clip] = slot;
      } else {
        a.status = null;
        a[kind] = slot;
        const opposite = kind === "best" ? "worst" : "best";
        if (this.kind === "gsb") a[opposite] = 1 - slot;
        else if (a[opposite] === slot) a[opposite] = null;
      }
      if (kind !== "score") this.settle(index);
      this.active = index;
      this.advance(a);
    }

    // To what is still open: the next clip of a row that is scored, else the next row.
    advance(a) {
      if (this.kind === "score" && !a.status) {
        const next = this.nextScore(a);
        if (next >= 0) {
          this.clip = next;
          return;
        }
      }
      if (!this.answered(a)) return;
      const next = this.rows.findIndex((row) => !this.answered(row));
      if (next < 0) return;
      this.active = next;
      this.clip = Math.max(0, this.nextScore(this.rows[next]));
    }

    chooseAnother() {
      const index = this.vetoed();
      if (index < 0) return;
      Object.assign(this.rows[index], { best: null, worst: null, veto: null, status: null });
      this.active = index;
      this.settle(index);
    }

    noValidPair() {
      const index = this.vetoed();
      if (index < 0) return;
      Object.assign(this.rows[index], { best: null, worst: null, veto: null, status: "no_valid_pair" });
      this.settle(index);
      const next = this.rows.findIndex((a) => !this.answered(a));
      this.active = next < 0 ? index : next;
    }

    // Rows whose pair the other answers leave open: some other row orders neither its best nor its worst clip.
    toConfirm() {
      if (this.kind !== "best_worst") return [];
      const rows = this.rows.map((a, i) => [a, i]).filter(([a]) => this.settled(a));
      return rows
        .filter(([a, i]) => rows.some(([b, j]) => j !== i && b.best !== a.best && b.worst !== a.worst))
        .map(([, i]) => i);
    }

    // [row, text] of the first thing that keeps the task from being submitted.
    missing() {
      for (let i = 0; i < this.rows.length; i++) {
        const a = this.rows[i], dimension = this.label(i);
        if (a.veto !== null) return [i, this.say("clashes_with", { dimension, other: this.label(a.veto) })];
        if (this.answered(a)) continue;
        if (this.kind === "score") return [i, this.say("needs_score", { dimension, clip: LETTERS[this.nextScore(a)] })];
        const what = a.best === null && a.worst === null ? "needs_answer" : a.best === null ? "needs_best" : "needs_worst";
        return [i, this.say(what, { dimension })];
      }
      return null;
    }

    payload() {
      return this.task.dimensions.map((dimension, i) => {
        const a = this.rows[i], state = a.status || "ok", scored = this.kind === "score";
        const picked = state === "ok" && !scored;
        return {
          dimension,
          status: state,
          best: picked ? a.best : null,
          worst: picked ? a.worst : null,
          first_best: a.first && !scored ? a.first[0] : null,
          first_worst: a.first && !scored ? a.first[1] : null,
          constrained: a.constrained && state !== "no_valid_pair",
          confirmed: picked ? a.confirmed : null,
          scores: scored && state === "ok" ? a.scores.slice(0, this.numClips) : null,
        };
      });
    }
  }

  window.reelhfParts = { ...window.reelhfParts, Answers, LETTERS };
})();
