/**
 * Stop and Cancel.
 *
 * Some kernels hear a message only when the cell is done (facts.md, section 4). A button that nobody hears is
 * worse than none: it is there only after a `hello` came back while the kernel was at work.
 */

import { h, replace } from '../dom'
import type { Word } from '../i18n'
import type { Surroundings } from '../view'

export class StopControl {
  readonly element = h('span', { class: 'stop-control' })
  private readonly button: HTMLButtonElement
  private isHeard = false
  private isOver = false

  constructor(
    private readonly surroundings: Pick<Surroundings, 'send' | 't' | 'view'>,
    words: Word,
    private readonly wordsAfter: Word,
  ) {
    const { t } = surroundings
    this.button = h('button', { type: 'button', class: 'stop', onclick: () => this.stop() }, t(words)) as HTMLButtonElement
    this.element.append(h('span', { class: 'muted' }, t('useInterrupt')))
  }

  /** The kernel hears this view. */
  heard(): void {
    if (this.isHeard || this.isOver) return
    this.isHeard = true
    replace(this.element, this.button)
  }

  /** Nothing is there to stop any more. */
  end(): void {
    this.isOver = true
    replace(this.element)
  }

  private stop(): void {
    const { send, t, view } = this.surroundings
    if (this.button.disabled) return
    this.button.disabled = true
    this.button.textContent = t(this.wordsAfter)
    send({ type: 'stop', view })
  }
}
