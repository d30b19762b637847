/** The controls of the editor: where the selection may go, the policy, undo and redo, Apply. */

import { h, replace, setText } from '../../dom'
import type { Translate } from '../../i18n'
import { formatBytes, formatNumber } from '../../units'
import { makeCopy } from './copy'
import type { Editor } from './editor'
import { makeOutcome, statusWords } from './outcome'
import { makeProgress } from './progress'
import { makePolite } from '../map/polite'
import { deviceTitle } from '../map/words'

export interface Panel {
  element: HTMLElement
  show: () => void
  /** Put the focus on the first tier that the selection may go to. */
  askWhere: () => void
  cleanup: () => void
}

/** `back` puts the focus on the blocks again. */
export function makePanel(t: Translate, editor: Editor, devices: () => string[], back: () => void): Panel {
  const selection = makeSelectionRow(t, editor, devices, back)
  const steps = makeSteps(t, editor)
  const copy = makeCopy(t)
  const apply = h('button', { type: 'button', class: 'primary', onclick: () => editor.apply() }) as HTMLButtonElement
  const outcome = makeOutcome(t)
  const progress = makeProgress(t, () => editor.stop())
  const status = makePolite()
  const element = h(
    'div', { class: 'panel', role: 'group', 'aria-label': t('editPanel'), tabindex: '-1' },
    selection.element,
    h('div', { class: 'controls' }, ...steps.elements, h('span', { class: 'spring' }), copy.element, apply),
    progress.element, status.element, outcome.element, copy.place,
  )
  return {
    element,
    askWhere: selection.focus,
    cleanup: status.cleanup,
    show() {
      selection.show()
      steps.show()
      copy.show(editor.plan.exports, editor.canEdit && editor.isKnown)
      setText(apply, t(editor.state.status === 'planned' ? 'editLoad' : 'editApply'))
      apply.disabled = !editor.canApply
      progress.show(editor)
      outcome.show(editor)
      status.say(statusWords(t, editor), editor.isApplying || editor.applied !== null)
    },
  }
}

interface SelectionRow {
  element: HTMLElement
  show: () => void
  focus: () => void
}

/** What is selected, and a button for each tier that it may go to. */
function makeSelectionRow(t: Translate, editor: Editor, devices: () => string[], back: () => void): SelectionRow {
  const words = h('span', { class: 'num' })
  const buttons = h('span', { class: 'buttons', role: 'group', 'aria-label': t('editMoveTo') })
  const element = h('div', { class: 'selection-row' }, words, buttons)
  let shown = ''
  const move = (device: string) => {
    editor.move(editor.selection.labels, device)
    back()
  }
  const arrange = (targets: string[]) => {
    if (targets.join('\n') === shown) return
    shown = targets.join('\n')
    replace(buttons, ...targets.map(device =>
      h('button', { type: 'button', 'data-target': device, onclick: () => move(device) }, `→ ${deviceTitle(t, device)}`)))
  }
  element.addEventListener('keydown', event => {
    if (event.key === 'Escape') back()
    else if (!stepButton(buttons, event.key)) return
    event.preventDefault()
    event.stopPropagation()
  })
  return {
    element,
    focus: () => enabledButtons(buttons)[0]?.focus(),
    show() {
      const { selection, canEdit } = editor
      const isAny = selection.labels.size > 0
      arrange(devices())
      buttons.hidden = !isAny || !canEdit
      element.hidden = !canEdit
      setText(words, isAny ? selectedWords(t, editor) : t('editHint'))
      words.classList.toggle('muted', !isAny)
      const movers = editor.movers(selection.labels)
      const homes = new Set(editor.plan.blocks.filter(block => movers.has(block.label)).map(block => block.home))
      for (const button of buttons.querySelectorAll('button')) {
        const device = button.getAttribute('data-target') ?? ''
        button.disabled = homes.size === 1 && homes.has(device)
      }
    },
  }
}

function enabledButtons(group: HTMLElement): HTMLButtonElement[] {
  return [...group.querySelectorAll('button')].filter(button => !button.disabled)
}

/** Left and right go between the buttons of a group. */
function stepButton(group: HTMLElement, key: string): boolean {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[key]
  if (step === undefined) return false
  const buttons = enabledButtons(group)
  const at = buttons.findIndex(button => button === (group.getRootNode() as Document | ShadowRoot).activeElement)
  buttons[(at + step + buttons.length) % buttons.length]?.focus()
  return true
}

/** `"3 blocks, 2.7 GiB"`, counting those that are tied to them. */
export function selectedWords(t: Translate, editor: Editor): string {
  const { labels } = editor.selection
  const movers = editor.movers(labels)
  const blocks = editor.plan.blocks.filter(block => movers.has(block.label))
  const size = formatBytes(blocks.reduce((sum, block) => sum + block.bytes, 0))
  const words = t(blocks.length === 1 ? 'editBlock' : 'editBlocks', { count: formatNumber(blocks.length), size })
  const tied = blocks.filter(block => !labels.has(block.label)).map(block => block.label)
  return tied.length ? `${words} ${t('editWithTied', { labels: tied.join(', ') })}` : words
}

/** The policy, and the way back. */
function makeSteps(t: Translate, editor: Editor): { elements: HTMLElement[]; show: () => void } {
  const select = h('select', { onchange: () => editor.choosePolicy(select.value) }) as HTMLSelectElement
  const button = (words: string, tip: string, act: () => void) =>
    h('button', { type: 'button', title: tip, onclick: act }, words) as HTMLButtonElement
  const undo = button(`↶ ${t('editUndo')}`, 'Ctrl+Z', () => editor.undo())
  const redo = button(`↷ ${t('editRedo')}`, 'Ctrl+Shift+Z', () => editor.redo())
  const reset = button(t('editReset'), t('editResetTip'), () => editor.reset())
  const revert = button(t('editRevert'), t('editRevertTip'), () => editor.revert())
  const policies = h('label', { class: 'policies' }, h('span', { class: 'muted' }, t('editPolicy')), select)
  return {
    elements: [policies, undo, redo, reset, revert],
    show() {
      showPolicies(t, select, editor)
      select.disabled = reset.disabled = !editor.canEdit
      undo.disabled = !editor.canUndo
      redo.disabled = !editor.canRedo
      revert.disabled = !editor.canEdit || !editor.step
    },
  }
}

function showPolicies(t: Translate, select: HTMLSelectElement, editor: Editor): void {
  const names = ['', ...editor.state.policies]
  const known = [...select.options].map(option => option.value)
  if (names.join('\n') !== known.join('\n')) {
    replace(select, ...names.map(name => h('option', { value: name, disabled: !name, hidden: !name }, name || t('editByHand'))))
  }
  if (select.value !== editor.policy) select.value = editor.policy
}
