/**
 * The order of an answer's events.
 *
 * A front end may come late, and a server drops messages when there are too many: a gap asks for the whole
 * answer, and pieces that would stand in the wrong place are left out until it is there. A question may be
 * lost as well, so it is asked again.
 */

import type { AnswerEvent } from '../../wire'

export type Verdict = 'next' | 'old' | 'unplaced' | 'whole'

/** Pieces that were left out before the whole answer is asked for again. */
const ASK_EVERY = 40

export class Sequence {
  private newest = 0
  private unplaced = 0

  /** `ask` asks the kernel for a whole one. */
  constructor(private readonly ask: () => void) {}

  take({ seq, whole }: Pick<AnswerEvent, 'seq' | 'whole'>): Verdict {
    // A whole one may have the number of the last delta: it answers a question and counts nothing.
    if (seq < this.newest || (seq === this.newest && !whole)) return 'old'
    const isNext = seq === this.newest + 1 && !this.unplaced
    this.newest = seq
    if (whole) {
      this.unplaced = 0
      return 'whole'
    }
    if (isNext) return 'next'
    if (this.unplaced % ASK_EVERY === 0) this.ask()
    this.unplaced += 1
    return 'unplaced'
  }
}
