/** What a view says when its kernel is gone. */

import { h, setText } from '../dom'

export class LostNote {
  // A status, not an alert: nothing is to be done at once, and several views may say it.
  readonly element = h('div', { class: 'lost', role: 'status', hidden: true })

  get isShown(): boolean {
    return !this.element.hidden
  }

  show(message: string): void {
    this.element.hidden = false
    setText(this.element, message)
  }
}
