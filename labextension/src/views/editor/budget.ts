/** A tier's budget as a slider: how much of a device the planner may use. */

import { h, setText } from '../../dom'
import type { Translate } from '../../i18n'
import { formatBytes } from '../../units'
import type { PlanState, TierState } from '../../wire'
import type { Editor } from './editor'
import { setAttribute } from '../map/cells'
import { scaleOf, share, shownTiers } from '../map/facts'
import { deviceTitle } from '../map/words'

const MIB = 1024 ** 2
const STEPS = 256
const LARGE = 4 // times the model's bytes

export interface Budget {
  element: HTMLElement
  show: (plan: PlanState, tier: TierState) => void
}

/** Whether a tier has a budget to set: blocks may be there, and there is an end to it. */
export function hasBudget(tier: TierState): boolean {
  return tier.can_hold && tier.kind !== 'disk'
}

export function makeBudget(t: Translate, device: string, editor: Editor): Budget {
  const name = t('editBudgetOf', { device: deviceTitle(t, device) })
  const input = h('input', { type: 'range', min: 0, 'aria-label': name }) as HTMLInputElement
  const value = h('span', { class: 'small num muted' })
  const all = h('button', { type: 'button', class: 'small all', 'aria-label': `${name}: ${t('editAllThatIsFree')}` }, t('editAll')) as HTMLButtonElement
  // As wide as the tier's bar where that shows all of it: the thumb is where the budget ends in the bar.
  const line = h('div', { class: 'slider' }, input)
  input.addEventListener('input', () => editor.setLimit(device, Number(input.value) * MIB))
  input.addEventListener('change', () => editor.endGesture())
  all.addEventListener('click', () => {
    input.focus() // the button goes
    editor.clearLimit(device)
  })
  const element = h('div', { class: 'row budget' },
    h('div', { class: 'small muted' }, t('editBudget')),
    h('div', { class: 'field' }, h('div', { class: 'track' }, line)), h('div', {}, value, ' ', all))
  return {
    element,
    show(plan, tier) {
      const isSet = device in editor.limits
      const most = maximum(plan, tier, editor.limits[device])
      // A plan whose budget was just given up does not know yet how much there is without it.
      const limit = Math.min(editor.limits[device] ?? (tier.is_limited ? tier.free : tier.limit), most)
      setAttribute(input, 'max', String(Math.floor(most / MIB)))
      setAttribute(input, 'step', String(stepOf(Math.min(most, 2 * plan.bytes))))
      const now = String(Math.round(limit / MIB))
      if (input.value !== now) input.value = now
      input.disabled = all.disabled = !editor.canEdit
      all.hidden = !isSet
      const words = t('editBudgetValue', { size: formatBytes(limit), total: formatBytes(most) })
      setAttribute(input, 'aria-valuetext', words)
      setText(value, isSet ? formatBytes(limit) : t('editAllFree', { size: formatBytes(limit) }))
      line.style.width = tier.is_whole ? share(most, scaleOf(shownTiers(plan, true))) : '100%'
      line.style.setProperty('--at', share(limit, most))
    },
  }
}

/** All of a device; of one that is much larger than the model, so much that the slider is still fine. */
function maximum(plan: PlanState, tier: TierState, limit = 0): number {
  const total = Math.max(MIB, tier.total || tier.free + tier.planned)
  return tier.is_whole ? total : Math.min(total, Math.max(LARGE * plan.bytes, limit, MIB))
}

/** Whole MiB, and few enough steps for arrow keys. Of 24 GiB: 96 MiB. */
function stepOf(most: number): number {
  return Math.max(1, Math.round(most / MIB / STEPS))
}
