// What a job's events tell: numbers by step, the plan, what was counted in the data, and messages.

/** Grows with every batch of events. */
export class Story {
  /** Numbers of steps by step. A run that went back to a checkpoint tells some again: the last word counts. */
  steps = new Map();
  evaluations = new Map();
  messages = [];
  plan = null;
  data = null;
  last = null;

  add(events) {
    for (const event of events) {
      const { data } = event;
      this.last = event.id;
      if (typeof data.train_loss === "number") this.steps.set(data.step, data);
      else if (typeof data.full_valid_loss === "number") this.evaluations.set(data.step, data.full_valid_loss);
      else this.messages.push(event);
      if (data.ledger) this.plan = data;
      if (typeof data.documents === "number") this.data = data;
    }
  }

  points(name) {
    return [...this.steps.values()].map((data) => [data.step, data[name]]).sort((a, b) => a[0] - b[0]);
  }

  validation() {
    return [...this.evaluations.entries()].sort((a, b) => a[0] - b[0]);
  }
}
