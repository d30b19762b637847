/**
 * Asking Python what a placement would mean, one question at a time.
 *
 * While an answer is awaited only the newest question is kept: a slider asks as often as Python answers.
 */

import type { Command, Placement } from '../wire'

export class Talk {
  private seq = 0
  private awaited: number | null = null
  private next: Placement | null = null
  /** Whether the question that is out is still the newest. */
  private isCurrent = false

  constructor(
    private readonly view: string,
    private readonly send: (command: Command) => void,
  ) {}

  get isWaiting(): boolean {
    return this.awaited !== null && (this.isCurrent || this.next !== null)
  }

  /** What would this mean? */
  propose(placement: Placement): void {
    if (this.awaited !== null) {
      this.next = placement
      this.isCurrent = false
      return
    }
    this.isCurrent = true
    this.awaited = ++this.seq
    this.send({ type: 'propose', view: this.view, seq: this.seq, placement })
  }

  /** Do it. Returns the number that the end of it will have. */
  apply(placement: Placement): number {
    this.drop()
    this.send({ type: 'apply', view: this.view, seq: ++this.seq, placement })
    return this.seq
  }

  /** No answer is of interest any more; the one that is out may still come. */
  forget(): void {
    this.next = null
    this.isCurrent = false
  }

  /** The kernel or the question is gone: nothing will come. */
  drop(): void {
    this.forget()
    this.awaited = null
  }

  /** An answer came: `newest` of what was asked, of a `past` question, or `stale` (not awaited). */
  take(seq: number): 'newest' | 'past' | 'stale' {
    if (seq !== this.awaited) return 'stale'
    const found = this.isCurrent ? 'newest' : 'past'
    this.awaited = null
    const { next } = this
    this.next = null
    if (next) this.propose(next)
    return found
  }
}
