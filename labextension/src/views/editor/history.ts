/** Steps that can be undone and done again. A gesture (a slider that moves) is one step. */
export class History<T> {
  private future: T[] = []
  private gesture = ''

  /** `past` can be undone from the beginning. */
  constructor(private now: T, private readonly past: T[] = []) {}

  get current(): T {
    return this.now
  }

  get canUndo(): boolean {
    return this.past.length > 0
  }

  get canRedo(): boolean {
    return this.future.length > 0
  }

  /** Go on to another step; it takes the place of the one before while the same `gesture` lasts. */
  push(step: T, gesture = ''): void {
    if (!gesture || gesture !== this.gesture) this.past.push(this.now)
    this.gesture = gesture
    this.future = []
    this.now = step
  }

  /** Know more of the current step; nothing to undo. */
  amend(step: T): void {
    this.now = step
  }

  endGesture(): void {
    this.gesture = ''
  }

  undo(): boolean {
    return this.travel(this.past, this.future)
  }

  redo(): boolean {
    return this.travel(this.future, this.past)
  }

  private travel(from: T[], to: T[]): boolean {
    const step = from.pop()
    if (step === undefined) return false
    to.push(this.now)
    this.now = step
    this.gesture = ''
    return true
  }
}
