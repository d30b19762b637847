/**
 * Which blocks of a plan are in place while a job is at work.
 *
 * Events come by number of tensors and may name a block or a tensor; the kernel sends only some of them. So a
 * block is done when a later event names another one, and where names are missing the share that is done says
 * how many blocks there must be.
 */

import type { BlockState, ProgressEvent } from '../../wire'

/** Phases that put blocks in their places; in the others nothing moves. */
const FILLING = new Set<ProgressEvent['phase']>(['loading', 'quantizing'])

export class BlockProgress {
  readonly done = new Set<string>()
  current = ''
  private phase: ProgressEvent['phase'] = null
  private labels: string[] = []

  /** The blocks in model order. What is done stays done where a label is the same. */
  setBlocks(blocks: BlockState[]): void {
    this.labels = blocks.map(block => block.label)
    for (const label of this.done) if (!this.labels.includes(label)) this.done.delete(label)
    if (this.phase === 'moving') this.fillUpTo(this.labels.length)
  }

  take(event: ProgressEvent): void {
    if (event.phase !== this.phase) this.begin(event.phase)
    const label = this.labelOf(event.detail)
    if (event.phase === 'moving') this.current = label
    else if (FILLING.has(event.phase)) this.fill(event, label)
  }

  /** Nothing is at work any more. */
  rest(): void {
    this.current = ''
  }

  private begin(phase: ProgressEvent['phase']): void {
    this.phase = phase
    this.current = ''
    if (FILLING.has(phase)) this.done.clear()
    // A model that is there already: of its blocks a few move, and the others stay.
    if (phase === 'moving') this.fillUpTo(this.labels.length)
  }

  private fill(event: ProgressEvent, label: string): void {
    if (label && label !== this.current) {
      if (this.current) this.done.add(this.current)
      this.current = label
    }
    const share = event.total ? Math.min(1, event.done / event.total) : 0
    if (share === 1) this.current = ''
    // The block at work is counted in the share and is not done.
    this.fillUpTo(Math.floor(share * this.labels.length) - (this.current ? 1 : 0))
  }

  private fillUpTo(count: number): void {
    for (const label of this.labels) {
      if (this.done.size >= count) return
      if (label !== this.current) this.done.add(label)
    }
  }

  /** The block that a label or the name of a tensor means; empty when it is none. */
  private labelOf(detail: string): string {
    if (!detail) return ''
    if (this.labels.includes(detail)) return detail
    const name = `.${detail}.`
    const named = this.labels.filter(label => name.includes(`.${label}.`))
    if (named.length) return longest(named)
    // `embed` is in `model.embed_tokens.weight`, `head` in `lm_head.weight`.
    const parts = detail.split('.').flatMap(part => part.split('_'))
    return this.labels.find(label => parts.includes(label)) ?? ''
  }
}

function longest(labels: string[]): string {
  return labels.reduce((one, other) => (other.length > one.length ? other : one))
}
