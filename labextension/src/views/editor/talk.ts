/**
 * Asking Python what a placement would mean, one question at a time.
 *
 * While an answer is awaited only the newest question is kept: a slider asks as often as Python answers.
 * An answer that does not come is asked for again.
 */

import type { Command, Placement } from '../../wire'

/** Until a question is asked again, in the beginning; twice as long each time. */
const PATIENCE_MS = 5000
/** Every tab hears the answers to every other: where numbers begin is drawn from so many. */
const FIRST_AT_MOST = 2 ** 40

export class Talk {
  private readonly first = Math.floor(Math.random() * FIRST_AT_MOST)
  private seq = this.first
  private awaited: number | null = null
  private asked: Placement | null = null
  private next: Placement | null = null
  /** Whether the question that is out is still the newest. */
  private isCurrent = false
  private timer: ReturnType<typeof setTimeout> | undefined

  constructor(
    private readonly view: string,
    private readonly send: (command: Command) => void,
  ) {}

  get isWaiting(): boolean {
    return this.awaited !== null && (this.isCurrent || this.next !== null)
  }

  /** Whether a number is one of ours. */
  isOwn(seq: number): boolean {
    return seq > this.first && seq <= this.seq
  }

  /** What would this mean? */
  propose(placement: Placement): void {
    if (this.awaited !== null) {
      this.next = placement
      this.isCurrent = false
      return
    }
    this.ask(placement)
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
    this.heard()
  }

  /** An answer came: `newest` of what was asked, of a `past` question, or `stale` (not awaited). */
  take(seq: number): 'newest' | 'past' | 'stale' {
    if (seq !== this.awaited) return 'stale'
    const found = this.isCurrent ? 'newest' : 'past'
    const { next } = this
    this.heard()
    this.next = null
    if (next) this.propose(next)
    return found
  }

  private ask(placement: Placement, patience = PATIENCE_MS): void {
    this.isCurrent = true
    this.asked = placement
    this.awaited = ++this.seq
    this.post(placement, this.seq, patience)
  }

  private post(placement: Placement, seq: number, patience: number): void {
    this.send({ type: 'propose', view: this.view, seq, placement })
    clearTimeout(this.timer)
    this.timer = setTimeout(() => this.insist(2 * patience), patience)
  }

  /** Nothing came. The same question keeps its number: an answer that is only late is as good. */
  private insist(patience: number): void {
    const { next, asked, awaited } = this
    this.next = null
    if (next) this.ask(next, patience)
    else if (asked && awaited !== null && this.isCurrent) this.post(asked, awaited, patience)
    else this.heard()
  }

  /** Nothing is awaited any more. */
  private heard(): void {
    clearTimeout(this.timer)
    this.timer = undefined
    this.awaited = this.asked = null
  }
}
