/**
 * The order of an answer's events.
 *
 * A front end may come late, and a server drops messages when there are too many: a gap asks for the whole
 * answer, once, and pieces that would stand in the wrong place are left out until it is there.
 */

import type { AnswerEvent } from '../wire'

export type Verdict = 'next' | 'old' | 'unplaced' | 'whole'

export class Sequence {
  private newest = 0
  private isWaiting = false

  /** `ask` asks the kernel for a whole one. */
  constructor(private readonly ask: () => void) {}

  take({ seq, whole }: Pick<AnswerEvent, 'seq' | 'whole'>): Verdict {
    // A whole one may have the number of the last delta: it answers a question and counts nothing.
    if (seq < this.newest || (seq === this.newest && !whole)) return 'old'
    const isNext = seq === this.newest + 1 && !this.isWaiting
    this.newest = seq
    if (whole) {
      this.isWaiting = false
      return 'whole'
    }
    if (isNext) return 'next'
    if (!this.isWaiting) this.ask()
    this.isWaiting = true
    return 'unplaced'
  }
}
